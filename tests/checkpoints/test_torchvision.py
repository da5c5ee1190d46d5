"""Our model against torchvision's own, with torchvision's weights."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints.parity import assert_same, images, randomize
from vit_probe.checkpoints import load_model
from vit_probe.errors import AssumptionWarning, InputError

pytest.importorskip("torchvision")

from torchvision.models import vit_b_16
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings


def _tiny(image_size: int = 48, **arguments: Any) -> VisionTransformer:
    sizes = {"patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 96, "num_classes": 7}
    return randomize(VisionTransformer(image_size=image_size, **(sizes | arguments)))  # type: ignore[return-value]


@pytest.mark.parametrize("image_size", [24, 48, 64, 96])
def test_agrees_with_torchvision(image_size: int, tmp_path: Path) -> None:
    native = _tiny()
    save_file(native.state_dict(), tmp_path / "tiny.safetensors")
    theirs = _tiny(image_size)
    theirs.load_state_dict(interpolate_embeddings(image_size, 8, copy.deepcopy(native.state_dict())))
    ours = load_model(tmp_path / "tiny.safetensors", num_heads=4)
    assert ours.config.image_size == (48, 48)
    with torch.no_grad():
        assert_same(ours(images(image_size)), theirs(images(image_size)))


def test_the_published_base_size(tmp_path: Path) -> None:
    theirs = randomize(vit_b_16(num_classes=10))
    torch.save(theirs.state_dict(), tmp_path / "vit_b_16.pth")
    ours = load_model(tmp_path / "vit_b_16.pth")
    assert (ours.config.num_heads, ours.config.norm_eps) == (12, 1e-6)
    with torch.no_grad():
        assert_same(ours(images(224, batch=1)), theirs(images(224, batch=1)))
    assert ours.preprocessing is not None
    assert (ours.preprocessing.size, ours.preprocessing.resize) == ((224, 224), 256)
    assert (ours.preprocessing.interpolation, ours.preprocessing.mean) == ("bilinear", (0.485, 0.456, 0.406))


@pytest.mark.parametrize(
    ("file", "arguments", "resize", "interpolation"),
    [
        ("vit_l_16-852ce7e3.pth", {"hidden_dim": 1024, "patch_size": 16, "num_heads": 16}, 242, "bilinear"),
        ("vit_b_32-d86f8d99.pth", {"patch_size": 32}, 256, "bilinear"),
        ("vit_b_16_lc_swag-4e70ced5.pth", {"patch_size": 16}, 224, "bicubic"),
        ("mine.pth", {"image_size": 384, "patch_size": 32}, 384, "bicubic"),
        ("mine.pth", {"patch_size": 32}, None, ""),
    ],
)
def test_which_of_torchvisions_weights_a_file_holds(
    file: str, arguments: dict[str, Any], resize: int | None, interpolation: str, tmp_path: Path
) -> None:
    model = _tiny(**({"image_size": 224, "num_layers": 1} | arguments))
    torch.save(model.state_dict(), tmp_path / file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours: Any = load_model(tmp_path / file, num_heads=4)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, AssumptionWarning)]
    if resize is None:
        assert len(said) == 1
        assert "which of torchvision's weights it holds; photographs are prepared as for IMAGENET1K_V1" in said[0]
    else:
        assert not said
        assert (ours.preprocessing.resize, ours.preprocessing.interpolation) == (resize, interpolation)


def test_old_names_of_the_mlp(tmp_path: Path) -> None:
    theirs = _tiny()
    old = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for name, value in theirs.state_dict().items()
    }
    assert "encoder.layers.encoder_layer_0.mlp.linear_2.bias" in old
    save_file(old, tmp_path / "old.safetensors")
    with torch.no_grad():
        assert_same(load_model(tmp_path / "old.safetensors", num_heads=4)(images(48)), theirs(images(48)))


def test_a_hidden_layer_before_the_head_can_be_left_out(tmp_path: Path) -> None:
    theirs = _tiny(representation_size=16)
    save_file(theirs.state_dict(), tmp_path / "pre_logits.safetensors")
    with pytest.raises(InputError, match=r"hidden layer before the head \(heads\.pre_logits\).*pass num_classes=0"):
        load_model(tmp_path / "pre_logits.safetensors", num_heads=4)
    ours = load_model(tmp_path / "pre_logits.safetensors", num_heads=4, num_classes=0)
    theirs.heads = torch.nn.Identity()
    with torch.no_grad():
        assert_same(ours(images(48)), theirs(images(48)))
