"""Our own models, saved and loaded again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vit_probe import InputError, Preprocessing, VisionTransformer, ViTConfig, load_model, save_model
from vit_probe.models.config import ResNetConfig

CONFIGS = {
    "twice the published number of heads": ViTConfig(image_size=(32, 48), patch_size=8, embed_dim=192, depth=1, num_heads=6),
    "learned_2d": ViTConfig(image_size=32, patch_size=(8, 16), embed_dim=32, depth=2, num_heads=4, position="learned_2d"),
    "sincos_2d": ViTConfig(image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, position="sincos_2d"),
    "hybrid": ViTConfig(
        image_size=64, patch_size=1, embed_dim=32, depth=1, num_heads=2, stem=ResNetConfig((1, 1, 1), width=32), num_registers=2
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_saved_model_is_loaded_unchanged(config: ViTConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(config).eval()
    torch.nn.init.normal_(model.head.weight)
    model.preprocessing = Preprocessing((32, 48), (40, 60), (0.1, 0.2, 0.3), interpolation="bilinear", crop_rounding="down")
    loaded = load_model(save_model(model, tmp_path / "mine.safetensors"))
    assert loaded.config == config
    assert loaded.preprocessing == model.preprocessing
    assert loaded.name == "mine.safetensors"
    images = torch.rand(2, 3, *config.image_size)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)


def test_a_file_from_before_the_crops_rounding_was_stated(tmp_path: Path) -> None:
    model = VisionTransformer(CONFIGS["learned_2d"])
    model.preprocessing = Preprocessing((32, 32), 36)
    path = save_model(model, tmp_path / "mine.safetensors")
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["vit_probe.model"])
    del content["preprocessing"]["crop_rounding"]
    save_file(model.state_dict(), path, metadata={"vit_probe.model": json.dumps(content)})
    assert load_model(path).preprocessing == Preprocessing((32, 32), 36, crop_rounding="half_to_even")


@pytest.mark.filterwarnings("ignore::vit_probe.errors.AssumptionWarning")
def test_half_precision_halves_the_file(tmp_path: Path) -> None:
    model = VisionTransformer(CONFIGS["learned_2d"])
    full = save_model(model, tmp_path / "full.safetensors").stat().st_size
    half = save_model(model.half(), tmp_path / "half.safetensors")
    assert half.stat().st_size < 0.6 * full
    assert load_model(half).blocks[0].norm1.weight.dtype == torch.float32


@pytest.mark.filterwarnings("ignore::vit_probe.errors.AssumptionWarning")
def test_overrides_take_precedence_over_the_file(tmp_path: Path) -> None:
    model = VisionTransformer(CONFIGS["learned_2d"])
    path = save_model(model, tmp_path / "mine.safetensors")
    assert load_model(path, num_classes=0).config == replace(model.config, num_classes=0)
    with pytest.raises(InputError, match=r"missing: blocks\.2\."):
        load_model(path, depth=3)


def test_another_suffix_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"saved as \.safetensors, got the path .*mine\.pt"):
        save_model(VisionTransformer(CONFIGS["learned_2d"]), tmp_path / "mine.pt")
