"""Which parameters a model is built from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vit_probe.checkpoints.checkpoint import Checkpoint
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.errors import InputError, UnsupportedArchitecture
from vit_probe.models.config import ResNetConfig, ViTConfig
from vit_probe.models.vit import VisionTransformer

TINY = ViTConfig(image_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=0)
NAME = "blocks.0.attn.qkv.weight"


def _with(weight: Tensor) -> Checkpoint:
    state = VisionTransformer(TINY).state_dict()
    return Checkpoint(TINY, state | {NAME: weight}, Preprocessing((16, 16), 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_numbers_become_float32(dtype: torch.dtype) -> None:
    weight = torch.rand(72, 24).to(dtype)
    built = _with(weight).build().blocks[0].attn.qkv.weight
    assert built.dtype == torch.float32
    torch.testing.assert_close(built.detach(), weight.float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        (torch.ones(72, 24, dtype=torch.int64), "int64"),
        (torch.ones(72, 24, dtype=torch.int8), "int8"),
        (torch.ones(72, 24, dtype=torch.bool), "bool"),
        (torch.ones(72, 24, dtype=torch.complex64), "complex64"),
        (torch.ones(72, 24).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.quantize_per_tensor(torch.ones(72, 24), 0.1, 0, torch.qint8), "qint8"),
        (torch.ones(72, 24).to_sparse(), "sparse_coo"),
        (torch.ones(72, 24, device="meta"), "meta"),
    ],
)
def test_other_numbers_are_refused(weight: Tensor, kind: str) -> None:
    with pytest.raises(
        InputError, match=rf"must be dense floating-point numbers .*, but the checkpoint holds {NAME} \({kind}\)"
    ):
        _with(weight).build()


@pytest.mark.parametrize(
    "config", [replace(TINY, depth=10**9), replace(TINY, patch_size=1, stem=ResNetConfig((10**9,)))], ids=["blocks", "stem"]
)
def test_absurd_depths_are_compared_with_the_weights_first(config: ViTConfig) -> None:
    with pytest.raises(
        UnsupportedArchitecture, match=r"100000000\d layers are configured, but the checkpoint holds \d\d param"
    ):
        Checkpoint(config, VisionTransformer(TINY).state_dict(), None).build()


def test_numbers_too_large_for_float32() -> None:
    with pytest.raises(InputError, match=rf"NaN or infinity .*, or numbers too large for float32, in {NAME}"):
        _with(torch.full((72, 24), 1e300, dtype=torch.float64)).build()


@pytest.mark.parametrize(("size", "resize"), [((10**6, 32), (32, 32)), ((32, 32), 10**6), ((32, 32), (32, 10**6))])
def test_absurd_sizes_of_photographs(size: tuple[int, int], resize: int | tuple[int, int]) -> None:
    checkpoint = Checkpoint(TINY, VisionTransformer(TINY).state_dict(), Preprocessing(size, resize))
    with pytest.raises(InputError, match="asks for photographs of 1000000 pixels a side; at most 16384 are supported"):
        checkpoint.build()
