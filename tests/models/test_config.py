"""Configurations: the papers' sizes, and what is refused."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from vit_probe.errors import InputError
from vit_probe.models.config import VARIANTS, ResNetConfig, ViTConfig
from vit_probe.models.vit import VisionTransformer


def parameters(config: ViTConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in VisionTransformer(config).parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # Dosovitskiy et al. 2021, table 1.
        ("B/16", 86), ("L/16", 307), ("H/14", 632),
        # Touvron et al. 2021, table 1, has 5M, 22M and 86M; more digits are timm's.
        ("Ti/16", 5.7), ("S/16", 22), ("S/32", 22.9),
        # Zhai et al. 2022, table 2.
        ("g/14", 1011), ("G/14", 1843),
        # timm's and torchvision's models of these names.
        ("B/32", 88.2), ("L/32", 306.5), ("R50+B/16", 98.9), ("R26+S/32", 36.4), ("R50+L/32", 328.9),
    ],
)  # fmt: skip
def test_parameter_counts_are_the_papers(name: str, millions: float) -> None:
    assert parameters(ViTConfig.variant(name)) / 1e6 == pytest.approx(millions, rel=0.012)


def test_exact_parameter_counts() -> None:
    """Counted by hand: embedding, class token, positions, layers, final norm, head."""
    layer = 2 * 2 * 768 + (768 * 2304 + 2304) + (768 * 768 + 768) + (768 * 3072 + 3072) + (3072 * 768 + 768)
    total = (768 * 768 + 768) + 768 + 197 * 768 + 12 * layer + 2 * 768 + (768 * 1000 + 1000)
    assert parameters(ViTConfig.variant("B/16")) == total == 86_567_656
    assert parameters(ViTConfig.variant("B/16", num_classes=0)) == total - 769_000
    assert parameters(ViTConfig.variant("B/16", position="sincos_2d")) == total - 197 * 768


@pytest.mark.parametrize("size", VARIANTS)
@pytest.mark.parametrize("patch", [8, 14, 16, 32])
def test_every_size_with_every_patch(size: str, patch: int) -> None:
    config = ViTConfig.variant(f"ViT-{size}/{patch}")
    assert config == ViTConfig.variant(f"{size}/{patch}")
    assert config.grid_size(224, 224) == (224 // patch, 224 // patch)
    row = VARIANTS[size]
    assert (config.embed_dim, config.depth, config.num_heads) == (row.width, row.layers, row.heads)
    assert round(config.embed_dim * config.mlp_ratio) == row.mlp


@pytest.mark.parametrize(
    ("name", "layers", "stride"), [("R50+B/16", (3, 4, 9), 16), ("R26+S/32", (2, 2, 2, 2), 32), ("R50+L/32", (3, 4, 6, 3), 32)]
)
def test_hybrids(name: str, layers: tuple[int, ...], stride: int) -> None:
    config = ViTConfig.variant(name)
    assert config.stem == ResNetConfig(layers)
    assert config.patch_stride == (stride, stride)
    assert config.stem.out_channels == 64 * 4 * 2 ** (len(layers) - 1)
    assert ResNetConfig(()).stride == 4
    assert ResNetConfig(()).out_channels == 64


def test_sizes_are_pairs_and_the_configuration_is_frozen() -> None:
    config = ViTConfig(image_size=64, patch_size=(8, 16))
    assert (config.image_size, config.patch_size, config.grid_size(64, 64)) == ((64, 64), (8, 16), (8, 4))
    with pytest.raises(FrozenInstanceError):
        config.depth = 3  # type: ignore[misc]


def test_prefix_tokens() -> None:
    config = ViTConfig(num_registers=4, distillation_token=True)
    assert (config.num_prefix_tokens, config.num_position_prefix_tokens) == (6, 6)
    assert ViTConfig(num_registers=4, position_prefix=1).num_position_prefix_tokens == 1
    assert ViTConfig(class_token=False, pooling="avg").num_prefix_tokens == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embed_dim": 100, "num_heads": 12}, "embed_dim 100 is not divisible by num_heads 12; change one, or set head_dim"),
        ({"head_dim": 0}, "head_dim must be at least 1, or None for embed_dim / num_heads; got 0"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"drop_path": 1.0}, "drop_path must be a rate from 0 to below 1, got 1.0"),
        ({"depth": "12"}, "depth must be an int, got '12'"),
        ({"num_heads": True}, "num_heads must be an int, got True"),
        ({"qkv_bias": "no"}, "qkv_bias must be True or False, got 'no'"),
        ({"norm_eps": float("nan")}, "norm_eps must be a finite number, got nan"),
        ({"norm_eps": -1.0}, "norm_eps must lie between 0 and 1, and mlp_ratio above 0; got -1.0 and 4.0"),
        ({"num_registers": -1}, "num_registers must not be negative, got -1"),
        ({"image_size": None}, r"image_size must be a positive int or a pair \(height, width\) of them, got None"),
        ({"dropout": -0.1}, "dropout must be a rate from 0 to below 1, got -0.1"),
        ({"image_size": 225}, r"225 x 225 pixels does not divide into patches of 16 x 16; resize or crop it"),
        ({"image_size": (224, 0)}, r"image_size must be a positive int or a pair \(height, width\) of them, got \(224, 0\)"),
        ({"patch_size": (4, 4, 4)}, r"patch_size must be a positive int or a pair .* got \(4, 4, 4\)"),
        ({"pooling": "max"}, "pooling must be one of token, avg, token\\+avg, distilled; got 'max'"),
        (
            {"position": "rope"},
            "position must be one of none, learned_1d, learned_2d, sincos_2d, relative, rope_2d; got 'rope'",
        ),
        ({"activation": "relu"}, "activation must be one of gelu, gelu_tanh, quick_gelu, swiglu; got 'relu'"),
        ({"position_resampling": "area"}, "position_resampling must be one of bicubic-antialias, bicubic, bicubic-align"),
        ({"class_token": False}, "pooling 'token' needs a class token; set class_token=True or pooling='avg'"),
        ({"pooling": "distilled"}, "pooling 'distilled' needs a distillation token; set distillation_token=True"),
        ({"position": "sincos_2d", "embed_dim": 6, "num_heads": 1}, "embed_dim divisible by 4, got 6"),
        ({"position": "learned_2d", "embed_dim": 5, "num_heads": 1}, "needs an even embed_dim, got 5"),
        ({"position_prefix": 2}, "position_prefix .*between 0 and the number of prefix tokens, 1"),
        ({"position_prefix": -1}, "position_prefix .*between 0 and the number of prefix tokens, 1"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ViTConfig(**fields)


def test_the_width_of_a_head() -> None:
    """Given, it need not divide the width: the projections go there and back. Counted by hand, as above."""
    config = ViTConfig.variant("B/16", head_dim=50)
    assert (config.dim_per_head, ViTConfig.variant("B/16").dim_per_head) == (50, 64)
    assert ViTConfig(embed_dim=100, num_heads=12, head_dim=7).dim_per_head == 7
    saved = 12 * (768 * 3 * 12 * 14 + 3 * 12 * 14 + 12 * 14 * 768)
    assert parameters(config) == parameters(ViTConfig.variant("B/16")) - saved
    assert parameters(ViTConfig.variant("B/16", head_dim=64)) == parameters(ViTConfig.variant("B/16"))


def test_parameters_of_positions_in_the_attention() -> None:
    """A table of 2 * 196 - 1 offsets of 64 channels in each of 12 layers, and nothing for rotations."""
    without = parameters(ViTConfig.variant("B/16", position="none"))
    assert parameters(ViTConfig.variant("B/16", position="relative")) == without + 12 * 391 * 64
    assert parameters(ViTConfig.variant("B/16", position="rope_2d")) == without


def test_unknown_variants() -> None:
    for name in ("XL/16", "B16", "B/", "R101+B/16", ""):
        with pytest.raises(InputError, match=re.escape(f"no ViT variant is called {name!r}; names are Ti/16, S/16")):
            ViTConfig.variant(name)
    with pytest.raises(InputError, match=r"'R50\+B/14' is not a hybrid of the papers; known are R50 with /16"):
        ViTConfig.variant("R50+B/14")
    with pytest.raises(InputError, match="ViTConfig has no field heads, width"):
        ViTConfig.variant("B/16", width=3, heads=2)
