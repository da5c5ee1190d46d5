"""open_clip's image towers, compared with what open_clip itself builds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.checkpoints.parity import images, randomize
from tests.checkpoints.test_load_model import Exploit
from vit_probe.checkpoints import load_model
from vit_probe.checkpoints.libraries.open_clip import _preprocessing
from vit_probe.errors import AssumptionWarning, InputError

open_clip = pytest.importorskip("open_clip")

from open_clip import factory  # noqa: E402
from open_clip.pretrained import _PRETRAINED  # noqa: E402
from open_clip.transform import PreprocessCfg  # noqa: E402

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}
SQUASHED = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear", "resize_mode": "squash"}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """An architecture `tiny` with weights in `tiny.safetensors`, which are also listed under two tags."""
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", CONFIG)
    file = str(tmp_path / "tiny.safetensors")
    monkeypatch.setitem(
        _PRETRAINED, "tiny", {"squashed": {"file": file} | SQUASHED, "quick": {"file": file, "quick_gelu": True}}
    )
    model = randomize(open_clip.create_model("tiny"))
    save_file(model.state_dict(), file)
    return model


def test_a_checkpoint_file(tiny: Any, tmp_path: Path, photograph: Image.Image) -> None:
    name = f"open_clip:tiny/{tmp_path / 'tiny.safetensors'}"
    ours = load_model(name)
    assert type(ours) is type(tiny.visual)
    assert (ours.name, ours.training) == (name, False)
    _, _, transform = open_clip.create_model_and_transforms("tiny")
    prepared = ours.preprocessing(photograph)
    assert torch.equal(prepared, transform(photograph))
    with torch.no_grad():
        assert torch.equal(ours(prepared[None]), tiny.encode_image(prepared[None]))
    torch.save({"state_dict": tiny.state_dict(), "epoch": 3}, tmp_path / "epoch_3.pt")
    with torch.no_grad():
        assert torch.equal(load_model(f"open_clip:tiny/{tmp_path / 'epoch_3.pt'}")(images(48)), tiny.visual(images(48)))


def test_a_tag_sets_the_preprocessing(tiny: Any, photograph: Image.Image) -> None:
    ours = load_model("open_clip:tiny/squashed")
    assert ours.name == "open_clip:tiny/squashed"
    _, _, transform = open_clip.create_model_and_transforms("tiny", pretrained="squashed")
    assert torch.equal(ours.preprocessing(photograph), transform(photograph))
    with torch.no_grad():
        assert torch.equal(ours(images(48)), tiny.visual(images(48)))


def test_a_tag_sets_the_activation(tiny: Any) -> None:
    """Given an architecture's name with the wrong GELU, open_clip only warns; we use the one that the weights need."""
    quick = open_clip.create_model("tiny", force_quick_gelu=True).eval()
    quick.load_state_dict(tiny.state_dict())
    with torch.no_grad():
        features = load_model("open_clip:tiny/quick")(images(48))
        assert torch.equal(features, quick.visual(images(48)))
        assert not torch.allclose(features, tiny.visual(images(48)), atol=1e-3)


def _folder(model: Any, folder: Path) -> Path:
    folder.mkdir()
    config = {"model_cfg": CONFIG, "preprocess_cfg": SQUASHED}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_a_folder_and_the_hub(tiny: Any, tmp_path: Path, put: Callable[[str, Path], None]) -> None:
    folder = _folder(tiny, tmp_path / "folder")
    put("someone/clip", folder)
    for name in (f"open_clip:local-dir:{folder}", "open_clip:hf-hub:someone/clip"):
        ours = load_model(name)
        assert (ours.name, ours.preprocessing.resize, ours.preprocessing.mean) == (name, (48, 48), (0.5, 0.5, 0.5))
        with torch.no_grad():
            assert torch.equal(ours(images(48)), tiny.visual(images(48)))
    with pytest.raises(InputError, match=r"^someone/other is not in the local cache, and the hub cannot be reached"):
        load_model("open_clip:hf-hub:someone/other")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"cannot load local-dir:\S+ \(Required pretrained weights .* could not be loaded"):
        load_model(f"open_clip:local-dir:{folder}")
    with pytest.raises(InputError, match=r"holds no open_clip_config\.json"):
        load_model(f"open_clip:local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-23/openai", r"^open_clip has no architecture 'ViT-B-23'; similar names are ViT-B-32, "),
        ("", r"^open_clip has no architecture ''$"),
        (
            "ViT-B-16",
            r"^open_clip:ViT-B-16 names no weights; write open_clip:ViT-B-16/TAG with one of openai, laion",
        ),
        ("ViT-B-16/", r"^open_clip:ViT-B-16/ names no weights"),
        (
            "ViT-B-16/laion3b",
            r"^open_clip has no weights 'laion3b' for ViT-B-16; write .*one of openai, .*ViT-B-16/PATH with the",
        ),
        ("ViT-S-16/x", r"^open_clip has no weights 'x' for ViT-S-16; it lists none; or open_clip:ViT-S-16/PATH with the path"),
    ],
)
def test_invalid_names(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(f"open_clip:{name}")


def test_overrides_are_rejected() -> None:
    with pytest.raises(InputError, match=r"^open_clip:ViT-B-32/openai is loaded by open_clip; .* leave out num_classes$"):
        load_model("open_clip:ViT-B-32/openai", num_classes=0)


def test_weights_that_do_not_fit_or_are_damaged(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    state = tiny.state_dict()
    save_file({name: value for name, value in state.items() if name != "visual.ln_post.weight"}, path)
    with pytest.raises(InputError, match=r"^open_clip cannot load tiny/\S+ \(.*Missing key.*\"visual\.ln_post\.weight\""):
        load_model(f"open_clip:tiny/{path}")
    save_file(state | {"visual.ln_post.weight": torch.full((32,), torch.nan)}, path)
    with pytest.raises(InputError, match=r"holds NaN or infinity .* in ln_post\.weight"):
        load_model(f"open_clip:tiny/{path}")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"^open_clip cannot load tiny/"):
        load_model(f"open_clip:tiny/{path}")
    torch.save({"state_dict": Exploit(tmp_path / "ran")}, tmp_path / "exploit.pt")
    with pytest.raises(InputError, match=r"^open_clip cannot load tiny/"):
        load_model(f"open_clip:tiny/{tmp_path / 'exploit.pt'}")
    assert not (tmp_path / "ran").exists()


def test_supported_and_unsupported_preprocessing(photograph: Image.Image) -> None:
    wide = _preprocessing(asdict(PreprocessCfg(size=(32, 64), resize_mode="squash")))
    assert wide is not None
    transform = factory.image_transform_v2(PreprocessCfg(size=(32, 64), resize_mode="squash"), is_train=False)
    assert torch.equal(wide(photograph), transform(photograph))
    assert _preprocessing(asdict(PreprocessCfg(size=(32, 64)))) is None
    with pytest.warns(AssumptionWarning, match=r"pads it; here .* exactly 48 x 48 pixels instead"):
        framed = _preprocessing(asdict(PreprocessCfg(size=48, resize_mode="longest", interpolation="random")))
    assert framed is not None
    assert (framed.size, framed.resize, framed.interpolation) == ((48, 48), (48, 48), "bicubic")


def test_without_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    message = r"^open_clip:ViT-B-32/openai needs the package open_clip: pip install 'vit-probe\[open_clip\]'$"
    with pytest.raises(InputError, match=message):
        load_model("open_clip:ViT-B-32/openai")
