"""timm's own models where `VisionTransformer` does not cover them, compared with what timm itself builds."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.checkpoints.libraries.conftest import change
from tests.checkpoints.parity import assert_same, images, randomize
from vit_probe.checkpoints import load_model
from vit_probe.checkpoints.hub import similar_timm_models
from vit_probe.errors import AssumptionWarning, InputError
from vit_probe.models.vit import VisionTransformer

timm = pytest.importorskip("timm")

TINY: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 4, "img_size": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "eva02_tiny_patch14_224": ("Eva", TINY | {"img_size": 56, "num_classes": 5}),
    "vit_small_patch16_dinov3": ("Eva", TINY | {"img_size": 256}),
    "swin_tiny_patch4_window7_224": (
        "SwinTransformer", {"img_size": 56, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}
    ),
    "vit_base_patch16_siglip_224": ("VisionTransformer", TINY),
    "vit_so400m_patch16_siglip_gap_256": ("VisionTransformer", TINY | {"act_layer": "relu"}),
    "beit_base_patch16_224": ("Beit", TINY | {"num_classes": 5}),
    "hiera_tiny_224": ("Hiera", {"stages": (1, 1, 1, 1), "num_classes": 5}),  # its width does not determine the number of heads
    "samvit_base_patch16": ("VisionTransformerSAM", TINY | {"img_size": 1024, "global_attn_indexes": (1,)}),
}  # fmt: skip


def _save(architecture: str, folder: Path, *, pickled: bool = False) -> Any:
    model = randomize(timm.create_model(architecture, **FAMILIES[architecture][1]))
    timm.models.save_for_hf(model, folder, safe_serialization=not pickled)
    return model


@pytest.mark.parametrize("architecture", FAMILIES)
def test_timms_own_model_with_its_weights_and_preprocessing(architecture: str, tmp_path: Path, photograph: Image.Image) -> None:
    theirs = _save(architecture, tmp_path / "mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error", AssumptionWarning)
        ours = load_model(tmp_path / "mine")
    assert (type(ours).__module__.partition(".")[0], type(ours).__name__) == ("timm", FAMILIES[architecture][0])
    assert type(ours) is type(theirs)
    assert (ours.name, ours.training) == ("mine", False)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    loaded = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded))
    prepared = ours.preprocessing(photograph)
    assert torch.equal(prepared, transform(photograph))
    if architecture != "samvit_base_patch16":  # a forward pass at 1,024 x 1,024 pixels takes long
        with torch.no_grad():
            assert_same(
                ours(prepared[None]), theirs(prepared[None]), tolerance=1e-5 if architecture.startswith("swin") else 1e-12
            )
    else:
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize(("name", "repository"), [("timm:eva.mine", "timm/eva.mine"), ("hf:someone/eva", "someone/eva")])
def test_from_the_hubs_cache(
    name: str, repository: str, pickled: bool, put: Callable[[str, Path], None], tmp_path: Path
) -> None:
    theirs = _save("eva02_tiny_patch14_224", tmp_path / "saved", pickled=pickled)
    put(repository, tmp_path / "saved")
    ours = load_model(name)
    assert (ours.name, ours.num_classes) == (name, 5)
    with torch.no_grad():
        assert torch.equal(ours(images(56)), theirs(images(56)))


def test_attention_is_fused_wherever_timm_can(tmp_path: Path) -> None:
    """timm fuses Swin's attention only on request; the request is withdrawn afterwards."""
    theirs = _save("swin_tiny_patch4_window7_224", tmp_path)
    assert not theirs.layers[0].blocks[0].attn.fused_attn
    assert load_model(tmp_path).layers[0].blocks[0].attn.fused_attn
    assert (timm.layers.use_fused_attn(), timm.layers.use_fused_attn(experimental=True)) == (True, False)
    timm.layers.set_fused_attn(False)
    try:
        assert not load_model(tmp_path).layers[0].blocks[0].attn.fused_attn
        assert not timm.layers.use_fused_attn()
    finally:
        timm.layers.set_fused_attn(True)


def test_our_own_model_where_it_covers_the_architecture(tmp_path: Path) -> None:
    theirs = randomize(timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5))
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    assert isinstance(load_model(tmp_path), VisionTransformer)
    assert isinstance(load_model(tmp_path / "model.safetensors", num_classes=0), VisionTransformer)


def test_warnings_about_assumptions_concern_our_own_model_only(tmp_path: Path) -> None:
    for architecture in ("eva02_tiny_patch14_224", "vit_tiny_patch16_224"):  # in files without the number of heads
        timm.models.save_for_hf(timm.create_model(architecture, depth=1), tmp_path / architecture, safe_serialization=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert type(load_model(tmp_path / "eva02_tiny_patch14_224")).__name__ == "Eva"
    assert not [warning for warning in caught if issubclass(warning.category, AssumptionWarning)]
    config = json.loads((tmp_path / "vit_tiny_patch16_224/config.json").read_text())
    (tmp_path / "vit_tiny_patch16_224/config.json").write_text(json.dumps(config | {"architecture": "vit_tiny_mine"}))
    with pytest.warns(AssumptionWarning, match="3 are assumed, as in published models of width 192"):
        assert load_model(tmp_path / "vit_tiny_patch16_224").config.num_heads == 3


def test_a_weight_file_next_to_its_configuration_is_loaded_with_it(tmp_path: Path) -> None:
    _save("eva02_tiny_patch14_224", tmp_path)
    assert type(load_model(tmp_path / "model.safetensors")).__name__ == "Eva"
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"unexpected: blocks\.0\.attn\.q_bias"):
        load_model(tmp_path / "model.safetensors", num_heads=4)


def test_images_that_do_not_divide_into_patches_are_left_to_timm(tmp_path: Path) -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=60, patch_size=16, num_classes=3)
    timm.models.save_for_hf(randomize(theirs), tmp_path, safe_serialization=True)
    ours = load_model(tmp_path)
    assert type(ours) is type(theirs)
    with torch.no_grad():
        assert torch.equal(ours(images(60)), theirs(images(60)))
    with pytest.raises(InputError, match=r"images of 60 x 60 pixels do not divide into patches of 16 x 16\); models of"):
        load_model(tmp_path, num_heads=3)


def test_overrides_are_rejected(tmp_path: Path) -> None:
    _save("vit_small_patch16_dinov3", tmp_path)
    message = (
        r"is loaded by timm, because VisionTransformer does not cover it \(vit_.*_dinov3 is of another family than ViT\); "
    )
    with pytest.raises(InputError, match=message + "models of .* accept no fields of ViTConfig, leave out num_classes$"):
        load_model(tmp_path, num_classes=0)


def test_without_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save("swin_tiny_patch4_window7_224", tmp_path / "swin")
    timm.models.save_for_hf(timm.create_model("vit_tiny_patch16_224", depth=1), tmp_path / "vit", safe_serialization=True)
    monkeypatch.setitem(sys.modules, "timm", None)
    message = (
        r"^.*swin can be loaded neither as VisionTransformer \(swin_.* is of another family than ViT\) nor with timm "
        r"\(the architecture swin_.* needs the package timm: pip install 'vit-probe\[timm\]'\)$"
    )
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "swin")
    assert isinstance(load_model(tmp_path / "vit"), VisionTransformer)
    assert similar_timm_models("vit_tiny") == ""


def test_a_library_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save("swin_tiny_patch4_window7_224", tmp_path / "swin")
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        InputError, match=r"timm, which is installed but cannot be imported \(operator torchvision::nms does not"
    ):
        load_model(tmp_path / "swin")


def _rewrite(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_an_architecture_that_timm_does_not_have(tmp_path: Path) -> None:
    _save("eva02_tiny_patch14_224", tmp_path)
    _rewrite(tmp_path, architecture="eva02_tiny_patch14_225")
    with pytest.raises(
        InputError,
        match=r"timm \d\S+ has no architecture eva02_tiny_patch14_225; similar names are eva02_tiny_patch14_224,.*newer",
    ):
        load_model(tmp_path)


def test_similar_names() -> None:
    assert "vit_small_patch16_224.augreg_in21k" in similar_timm_models("vit_small_patch16_224.augreg_in21")
    assert similar_timm_models("qqqqqqqqqqqqqqqqqqqqqqqqqqqqq") == ""


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (
            "eva02_tiny_patch14_224",
            r"the weights do not load into eva02_tiny_patch14_224: .*Missing key\(s\).*\"blocks\.1\.mlp\.fc1\.weight",
        ),
        (
            "vit_so400m_patch16_siglip_gap_256",
            r"the weights are incomplete for \S+: Missing keys \(blocks\.1\.mlp\.fc1\.weight\)",
        ),
    ],
)
def test_parameters_that_are_missing_are_never_random(architecture: str, message: str, tmp_path: Path) -> None:
    """timm loads the second architecture leniently: it only logs which parameters are missing."""
    _save(architecture, tmp_path)
    change(tmp_path, remove="blocks.1.mlp.fc1.weight")
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)
    assert logging.getLogger("timm.models._builder").level == logging.NOTSET
    assert not logging.getLogger("timm.models._builder").filters


def test_a_head_of_another_number_of_classes_is_not_random(tmp_path: Path) -> None:
    _save("eva02_tiny_patch14_224", tmp_path)
    _rewrite(tmp_path, num_classes=9)
    with pytest.raises(
        InputError, match=r"are incomplete for eva02_tiny_patch14_224: Missing keys \(head\.weight, head\.bias\)"
    ):
        load_model(tmp_path)


def test_parameters_that_are_unexpected_or_not_finite(tmp_path: Path) -> None:
    _save("eva02_tiny_patch14_224", tmp_path)
    change(tmp_path, extra=torch.zeros(3))
    with pytest.raises(InputError, match=r"do not load into eva02_tiny_patch14_224: .*Unexpected key.*\"extra\""):
        load_model(tmp_path)
    change(tmp_path, remove="extra", **{"fc_norm.weight": torch.full((48,), torch.nan)})
    with pytest.raises(InputError, match=r"holds NaN or infinity .* in fc_norm\.weight"):
        load_model(tmp_path)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_damaged_file_is_an_error_without_fallback(pickled: bool, tmp_path: Path) -> None:
    _save("eva02_tiny_patch14_224", tmp_path, pickled=pickled)
    file = tmp_path / ("pytorch_model.bin" if pickled else "model.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match=rf"^{file} is not a"):
        load_model(tmp_path)
