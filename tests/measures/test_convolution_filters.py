"""First-layer filters read from state dicts of convolutional networks."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vit_probe import InputError, load_result, patch_filters
from vit_probe.errors import AssumptionWarning
from vit_probe.measures import PatchFiltersResult
from vit_probe.measures.patch_filters import convolution_filters


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, (5, 4), stride=2), nn.ReLU(), nn.Conv2d(6, 3, 3), nn.Conv2d(3, 2, 3))


def saved(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_the_filters_are_those_of_the_network_in_the_file(suffix: str, tmp_path: Path) -> None:
    model = network()[:2]
    path = saved(model.state_dict(), tmp_path / f"cnn{suffix}")
    result = convolution_filters(path)
    np.testing.assert_array_equal(result.filters, model[0].weight.detach().double().numpy())
    np.testing.assert_array_equal(result.filters, patch_filters(model, components=None).filters)
    assert not result.principal
    assert np.isnan(result.explained_variance_ratio).all()
    assert result.title == "First-layer filters (6)"
    assert result.provenance["layers"] == ["0.weight"]
    assert result.provenance["model"] == {
        "name": path.name,
        "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


@pytest.mark.parametrize("name", ["alexnet", "resnet18"])
def test_networks_of_torchvision(name: str, tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    state = {key: value for key, value in models.get_model(name, num_classes=2).state_dict().items() if "classifier" not in key}
    result = convolution_filters(saved(state, tmp_path / "cnn.pth"))
    first = {"alexnet": "features.0.weight", "resnet18": "conv1.weight"}[name]
    assert result.provenance["layers"] == [first]
    np.testing.assert_array_equal(result.filters, state[first].double().numpy())
    assert len(result.plot().images) == 1


def test_a_training_checkpoint_in_half_precision(tmp_path: Path) -> None:
    state = {f"module.{name}": value.bfloat16() for name, value in network()[:2].state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "checkpoint.pth")
    result = convolution_filters(tmp_path / "checkpoint.pth")
    assert result.provenance["layers"] == ["0.weight"]
    np.testing.assert_array_equal(result.filters, state["module.0.weight"].double().numpy())


def test_what_is_no_filter_of_colours_is_passed_by(tmp_path: Path) -> None:
    """Fewer or more dimensions, other channels, single pixels, none at all."""
    shapes = {"a": (4, 3), "b": (4, 3, 2, 2, 2), "c": (4, 6, 2, 2), "d": (4, 3, 1, 1), "e": (0, 3, 2, 2), "f": (4, 3, 1, 2)}
    state = {name: torch.rand(shape) for name, shape in shapes.items()}
    assert convolution_filters(saved(state, tmp_path / "cnn.pth")).provenance["layers"] == ["f"]


@pytest.mark.parametrize(("suffix", "taken", "other"), [(".pth", "stem", "again"), (".safetensors", "again", "stem")])
def test_of_several_the_first_is_taken_and_the_others_named(suffix: str, taken: str, other: str, tmp_path: Path) -> None:
    state = {"stem": torch.rand(4, 3, 2, 2), "again": torch.rand(5, 3, 3, 3)}
    path = saved(state, tmp_path / f"cnn{suffix}")
    with pytest.warns(AssumptionWarning, match=rf"of cnn\{suffix} the filters of {taken} are taken, not those of {other}"):
        result = convolution_filters(str(path))
    assert result.filters.shape == state[taken].shape


def test_saved_and_read_back(tmp_path: Path) -> None:
    result = convolution_filters(saved(network()[:2].state_dict(), tmp_path / "cnn.pth"))
    again = load_result(result.save(tmp_path / "filters.safetensors"))
    assert isinstance(again, PatchFiltersResult)
    np.testing.assert_array_equal(again.filters, result.filters)
    assert again.provenance == result.provenance


# Errors


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file .*nowhere.pth"):
        convolution_filters(tmp_path / "nowhere.pth")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "cnn.onnx").write_bytes(b"graph")
    with pytest.raises(InputError, match=r"cnn.onnx is no file of weights that can be read; known are .safetensors, .pt, .pth"):
        convolution_filters(tmp_path / "cnn.onnx")


def test_no_convolution_over_colours(tmp_path: Path) -> None:
    path = saved({"conv.weight": torch.rand(4, 1, 3, 3), "fc.weight": torch.rand(2, 4)}, tmp_path / "grey.pth")
    with pytest.raises(InputError) as caught:
        convolution_filters(path)
    assert str(caught.value) == (
        f"{path} holds no convolution over 3 colour channels, a parameter of shape (filter, 3, row, col) of more than one "
        "pixel; its first parameters are conv.weight (4, 1, 3, 3), fc.weight (2, 4)"
    )


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    path = saved({"conv.weight": torch.full((4, 3, 3, 3), torch.inf)}, tmp_path / "cnn.pth")
    with pytest.raises(InputError, match=r"the filters conv.weight of .*cnn.pth are not all finite"):
        convolution_filters(path)


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "cnn.pth")
    with pytest.raises(InputError, match="cannot be read without running pickled code"):
        convolution_filters(tmp_path / "cnn.pth")
