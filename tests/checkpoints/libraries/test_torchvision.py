"""torchvision's models by name: its Vision Transformers become ours, others stay torchvision's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from torch import nn

from tests.checkpoints.parity import assert_same, images, randomize
from tests.checkpoints.test_load_model import Exploit
from vit_probe.checkpoints import load_model
from vit_probe.errors import InputError
from vit_probe.models.vit import VisionTransformer

torchvision = pytest.importorskip("torchvision")

from torchvision.models import ResNet18_Weights, Swin_T_Weights, ViT_B_16_Weights, WeightsEnum  # noqa: E402
from torchvision.models.vision_transformer import VisionTransformer as TheirVisionTransformer  # noqa: E402


class Published:
    """Replaces the download: `weights.get_state_dict` returns `state`, and its calls are recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state: dict[str, Any] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []

        def get_state_dict(weights: Any, **options: Any) -> dict[str, Any]:
            self.calls.append((str(weights), options))
            return self.state

        monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Published:
    return Published(monkeypatch)


@pytest.mark.parametrize(("name", "weights"), [("resnet18", ResNet18_Weights.DEFAULT), ("swin_t", Swin_T_Weights.DEFAULT)])
def test_torchvisions_own_model(name: str, weights: Any, published: Published, photograph: Image.Image) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name).eval()
    published.state = theirs.state_dict()
    ours = load_model(f"torchvision:{name}")
    assert type(ours) is type(theirs)
    assert (ours.name, ours.training) == (f"torchvision:{name}", False)
    assert published.calls[0][0] == str(weights)
    assert published.calls[0][1].items() >= {"check_hash": True, "weights_only": True, "progress": False}.items()
    prepared = ours.preprocessing(photograph)
    assert torch.equal(prepared, weights.transforms()(photograph))
    with torch.no_grad():
        assert torch.equal(ours(prepared[None]), theirs(prepared[None]))


@pytest.mark.parametrize("tag", ["", "IMAGENET1K_V1", "IMAGENET1K_SWAG_E2E_V1", "IMAGENET1K_SWAG_LINEAR_V1"])
def test_vision_transformers_are_ours_with_the_preprocessing_of_their_weights(
    tag: str, published: Published, photograph: Image.Image
) -> None:
    weights = ViT_B_16_Weights[tag or "DEFAULT"]
    size = weights.transforms().crop_size[0]
    theirs = randomize(TheirVisionTransformer(size, 16, num_layers=1, num_heads=12, hidden_dim=768, mlp_dim=64, num_classes=7))
    published.state = theirs.state_dict()
    name = f"torchvision:vit_b_16.{tag}" if tag else "torchvision:vit_b_16"
    ours = load_model(name)
    assert isinstance(ours, VisionTransformer)
    assert (ours.name, ours.config.image_size, ours.config.num_heads) == (name, (size, size), 12)
    assert published.calls[0][0] == str(weights)
    assert ours.preprocessing is not None
    assert torch.equal(ours.preprocessing(photograph), weights.transforms()(photograph))
    with torch.no_grad():
        assert_same(ours(images(size, batch=1)), theirs(images(size, batch=1)))
    assert load_model(name, num_classes=0).config.num_classes == 0


def test_every_preset_is_supported() -> None:
    from vit_probe.checkpoints.libraries.torchvision import _preprocessing

    models = torchvision.models
    weights = [weights for name in models.list_models(module=models) for weights in models.get_model_weights(name)]
    assert len(weights) > 100
    assert not [str(entry) for entry in weights if _preprocessing(entry.transforms()) is None]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_b_61", r"^torchvision has no classification model 'vit_b_61'; similar names are vit_b_16, "),
        ("", r"^torchvision has no classification model ''$"),
        ("raft_small", r"no classification model 'raft_small'"),
        ("swin_t.SWAG", r"^torchvision has no weights 'SWAG' of swin_t; it has IMAGENET1K_V1, DEFAULT$"),
    ],
)
def test_invalid_names(name: str, message: str, published: Published) -> None:
    with pytest.raises(InputError, match=message):
        load_model(f"torchvision:{name}")
    assert not published.calls


def test_overrides_are_rejected_before_any_download(published: Published) -> None:
    with pytest.raises(InputError, match=r"^torchvision:swin_t is loaded by torchvision; .* leave out num_classes$"):
        load_model("torchvision:swin_t", num_classes=0)
    assert not published.calls


def test_weights_that_do_not_fit(published: Published) -> None:
    state = torchvision.models.get_model("resnet18").state_dict()
    published.state = {name: value for name, value in state.items() if name != "fc.bias"}
    with pytest.raises(
        InputError, match=r"^the weights ResNet18_Weights\.IMAGENET1K_V1 do not fit resnet18: .*\"fc\.bias\"\.$"
    ):
        load_model("torchvision:resnet18")
    published.state = state | {"fc.bias": torch.full((1000,), torch.nan)}
    with pytest.raises(InputError, match=r"holds NaN or infinity .* in fc\.bias"):
        load_model("torchvision:resnet18")


def test_without_a_network_and_with_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(
        InputError, match=rf"can be neither downloaded nor read from {tmp_path}/checkpoints \(URLError: .*no route"
    ):
        load_model("torchvision:resnet18")
    file = tmp_path / "checkpoints/resnet18-f37072fd.pth"
    file.write_bytes(b"hello world" * 50)
    with pytest.raises(
        InputError, match=r"ResNet18_Weights\.IMAGENET1K_V1 can be neither downloaded nor read .*delete the file there"
    ):
        load_model("torchvision:resnet18")
    torch.save({"fc.bias": Exploit(tmp_path / "ran")}, file)
    with pytest.raises(InputError, match=r"\(UnpicklingError: "):
        load_model("torchvision:resnet18")
    assert not (tmp_path / "ran").exists()
    torch.save(torchvision.models.get_model("resnet18").state_dict(), file)
    assert isinstance(load_model("torchvision:resnet18"), nn.Module)


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(
        InputError, match=r"^torchvision:vit_b_16 needs the package torchvision: pip install 'vit-probe\[torchvision\]'$"
    ):
        load_model("torchvision:vit_b_16")
