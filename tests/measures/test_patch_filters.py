"""Filters of the first layer: principal components against the literal reference and scikit-learn, and what else they say."""

from __future__ import annotations

import hashlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from einops.layers.torch import Rearrange
from matplotlib.axes import Axes
from numpy.typing import NDArray
from safetensors.torch import save_file
from sklearn.decomposition import PCA
from torch import Tensor, nn

from tests import reference
from tests.example_models import FAMILIES, small_vit
from vit_probe import InputError, load_model, load_result, patch_filters
from vit_probe.errors import AssumptionWarning
from vit_probe.measures import PatchFiltersResult
from vit_probe.measures.patch_filters import convolution_filters, low_frequency_share
from vit_probe.models.config import ResNetConfig
from vit_probe.results import weights_sha256


def _model(dim: int = 32) -> nn.Module:
    return small_vit(image_size=(12, 12), patch_size=(3, 4), embed_dim=dim)


def _conv(weight: torch.Tensor) -> nn.Conv2d:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]))
    conv.weight = nn.Parameter(weight)
    return conv


@pytest.mark.parametrize("name", FAMILIES)
def test_components_are_the_references(name: str) -> None:
    model = FAMILIES[name].model()
    weight = next(m.weight for m in model.modules() if isinstance(m, nn.Conv2d)).detach().double().numpy()
    result = patch_filters(model, components=10)
    filters, ratios = reference.patch_filter_pca(weight, 10)
    np.testing.assert_allclose(result.filters, filters, atol=1e-9)
    np.testing.assert_allclose(result.explained_variance_ratio, ratios, atol=1e-12)
    assert result.principal


def test_components_are_those_of_scikit_learn_with_a_sign() -> None:
    model = _model()
    samples = model.patch_embed.proj.weight.detach().double().flatten(1).numpy()
    result = patch_filters(model, components=12)
    pca = PCA(n_components=12, svd_solver="full").fit(samples)
    flat = result.filters.reshape(12, -1)
    np.testing.assert_allclose(abs(flat), abs(pca.components_), atol=1e-10)
    np.testing.assert_allclose(result.explained_variance_ratio, pca.explained_variance_ratio_)
    assert (flat[np.arange(12), abs(flat).argmax(1)] > 0).all()
    np.testing.assert_allclose(flat @ flat.T, np.eye(12), atol=1e-9)
    assert result.filters.shape == (12, 3, 3, 4)
    assert (np.diff(result.explained_variance_ratio) <= 0).all()


def test_the_sign_of_the_weights_and_a_common_offset_change_nothing() -> None:
    weight = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    first = patch_filters(_conv(weight), components=5)
    second = patch_filters(_conv(weight + torch.randn(1, 3, 4, 4)), components=5)
    np.testing.assert_allclose(second.filters, first.filters, atol=1e-5)
    third = patch_filters(_conv(-2 * weight), components=5)
    np.testing.assert_allclose(third.filters, first.filters, atol=1e-9)


def test_signs_do_not_depend_on_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Negative(PCA):
        def fit(self, X, y=None):
            super().fit(X)
            self.components_ = -self.components_
            return self

    expected = patch_filters(_model(), components=5)
    monkeypatch.setattr(sys.modules["vit_probe.measures.patch_filters"], "PCA", Negative)
    np.testing.assert_array_equal(patch_filters(_model(), components=5).filters, expected.filters)


def test_filters_of_one_known_direction() -> None:
    direction = torch.zeros(3, 2, 2)
    direction[1, 0, 1] = -1
    weight = torch.linspace(-1, 1, 8)[:, None, None, None] * direction + 0.3
    result = patch_filters(_conv(weight), components=1)
    np.testing.assert_allclose(result.filters[0], -direction, atol=1e-6)
    assert result.explained_variance_ratio[0] == pytest.approx(1)


def test_twenty_eight_components_by_default() -> None:
    assert len(patch_filters(_model()).filters) == 28


def test_half_precision_weights() -> None:
    result = patch_filters(_model().bfloat16(), components=3)
    weight = _model().bfloat16().patch_embed.proj.weight.detach().double().numpy()
    np.testing.assert_allclose(result.filters, reference.patch_filter_pca(weight, 3)[0], atol=1e-9)


def test_plain_filters_of_a_convolutional_network() -> None:
    from torchvision.models import alexnet

    features = alexnet(num_classes=2).features
    result = patch_filters(features, components=None)
    assert result.filters.shape == (64, 3, 11, 11)
    np.testing.assert_array_equal(result.filters, features[0].weight.detach().double().numpy())
    assert np.isnan(result.explained_variance_ratio).all()
    assert not result.principal
    assert result.title == "First-layer filters (64)"
    assert isinstance(result.plot(), Axes)
    assert result.provenance["layers"] == ["0.weight"]


def test_the_model_is_left_alone() -> None:
    features = _conv(torch.randn(8, 3, 2, 2))
    before = features.weight.detach().clone()
    result = patch_filters(features, components=None)
    result.filters[:] = 0
    assert torch.equal(features.weight, before)


def test_the_first_convolution_of_a_hybrid() -> None:
    model = small_vit(image_size=(32, 32), patch_size=(1, 1), stem=ResNetConfig(layers=(1, 1), width=32))
    result = patch_filters(model, components=4)
    assert result.filters.shape == (4, 3, 7, 7)
    assert result.provenance["layers"][0].startswith("patch_embed.")


@pytest.mark.parametrize(("channels", "name"), [(1, "Grey"), (3, "RGB"), (4, "4-channel"), (13, "13-channel")])
def test_images_of_other_channels(channels: int, name: str) -> None:
    weight = torch.randn(40, channels, 3, 5)
    result = patch_filters(_conv(weight), components=6)
    filters, ratios = reference.patch_filter_pca(weight.double().numpy(), 6)
    np.testing.assert_allclose(result.filters, filters, atol=1e-9)
    np.testing.assert_allclose(result.explained_variance_ratio, ratios, atol=1e-12)
    assert result.title == f"{name} embedding filters\n(first 6 principal components)"
    assert result.to_dataframe().channel.nunique() == channels
    assert len(result.plot().images) == 1


def test_chosen_channels_are_drawn() -> None:
    result = patch_filters(_conv(torch.randn(40, 5, 3, 5)), components=6)
    picture = np.asarray(result.plot(channels=(4, 0, 2)).images[0].get_array())
    first = result.filters[0, [4, 0, 2]]
    np.testing.assert_allclose(picture[:3, :5], ((first - first.min()) / np.ptp(first)).transpose(1, 2, 0), atol=1e-12)


def test_components_of_a_linear_layer() -> None:
    """The same as those of the convolution with its weights."""
    conv = nn.Conv2d(3, 32, 4, 4)
    linear = nn.Linear(48, 32)
    linear.weight = nn.Parameter(conv.weight.detach().permute(0, 2, 3, 1).flatten(1))
    model = nn.Sequential(Rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=4, p2=4), nn.LayerNorm(48), linear)
    result = patch_filters(model, components=6)
    np.testing.assert_array_equal(result.filters, patch_filters(conv, components=6).filters)
    assert result.provenance["layers"] == ["2.weight"]


# The result


def test_dataframe_has_one_row_per_weight() -> None:
    result = patch_filters(_model(), components=3)
    frame = result.to_dataframe()
    assert list(frame) == ["filter", "explained_variance_ratio", "channel", "row", "col", "weight"]
    assert len(frame) == 3 * 3 * 3 * 4
    for index, channel, row, col in ((0, 0, 0, 0), (1, 2, 0, 3), (2, 1, 2, 1)):
        match = frame[(frame["filter"] == index) & (frame.channel == channel) & (frame.row == row) & (frame.col == col)]
        assert match.weight.tolist() == [result.filters[index, channel, row, col]]
        assert match.explained_variance_ratio.tolist() == [result.explained_variance_ratio[index]]


def test_summary_adds_up() -> None:
    result = patch_filters(_model(), components=20)
    summary = result.summary()
    assert summary["components"].tolist() == [1, 4, 16, 20]
    expected = [result.explained_variance_ratio[:count].sum() for count in (1, 4, 16, 20)]
    np.testing.assert_allclose(summary["explained variance"], expected)


def test_plot_returns_axes() -> None:
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    result = patch_filters(_model(), components=9)
    assert result.plot(ax=ax) is ax
    assert "first 9 principal components" in result.title


@pytest.mark.parametrize("components", [4, None])
def test_saved_and_read_back(components: int | None, tmp_path) -> None:
    model = _model()
    result = patch_filters(model, components=components)
    again = load_result(result.save(tmp_path / "filters.safetensors"))
    assert isinstance(again, PatchFiltersResult)
    np.testing.assert_array_equal(again.filters, result.filters)
    np.testing.assert_array_equal(again.explained_variance_ratio, result.explained_variance_ratio)
    assert again.principal is (components is not None)
    assert again.provenance == result.provenance
    assert again.provenance["options"] == {"components": components}
    assert again.provenance["model"]["weights_sha256"] == weights_sha256(model)


# Errors


@pytest.mark.parametrize("components", [0, -1])
def test_less_than_one_component(components: int) -> None:
    with pytest.raises(InputError, match=f"components must be at least 1 .*got {components}"):
        patch_filters(_model(32), components=components)


@pytest.mark.parametrize(("dim", "available"), [(32, 31), (64, 36)])
def test_no_more_components_than_there_are(dim: int, available: int) -> None:
    assert len(patch_filters(_model(dim), components=1000).filters) == available


def test_filters_that_are_not_finite() -> None:
    with pytest.raises(InputError, match="filters are not all finite"):
        patch_filters(_conv(torch.full((4, 3, 2, 2), torch.nan)))


def test_no_layer_that_sees_the_image() -> None:
    with pytest.raises(InputError, match="Sequential has no convolution or linear layer that sees the pixels of an image"):
        patch_filters(nn.Sequential(nn.Linear(3, 3), nn.Conv2d(8, 8, 3)))


# convolution_filters: first-layer filters from a state dict


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


def test_parameters_that_are_not_colour_filters_are_skipped(tmp_path: Path) -> None:
    """Fewer or more dimensions, other channels, single pixels, none at all."""
    shapes = {"a": (4, 3), "b": (4, 3, 2, 2, 2), "c": (4, 6, 2, 2), "d": (4, 3, 1, 1), "e": (0, 3, 2, 2), "f": (4, 3, 1, 2)}
    state = {name: torch.rand(shape) for name, shape in shapes.items()}
    assert convolution_filters(saved(state, tmp_path / "cnn.pth")).provenance["layers"] == ["f"]


@pytest.mark.parametrize(("suffix", "taken", "other"), [(".pth", "stem", "again"), (".safetensors", "again", "stem")])
def test_the_first_of_several_is_used_and_the_others_are_named(suffix: str, taken: str, other: str, tmp_path: Path) -> None:
    state = {"stem": torch.rand(4, 3, 2, 2), "again": torch.rand(5, 3, 3, 3)}
    path = saved(state, tmp_path / f"cnn{suffix}")
    with pytest.warns(
        AssumptionWarning, match=rf"cnn\{suffix} holds several .*; using the filters of {taken}, not those of {other}"
    ):
        result = convolution_filters(str(path))
    assert result.filters.shape == state[taken].shape


def test_convolution_filters_saved_and_read_back(tmp_path: Path) -> None:
    result = convolution_filters(saved(network()[:2].state_dict(), tmp_path / "cnn.pth"))
    again = load_result(result.save(tmp_path / "filters.safetensors"))
    assert isinstance(again, PatchFiltersResult)
    np.testing.assert_array_equal(again.filters, result.filters)
    assert again.provenance == result.provenance


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file .*nowhere.pth"):
        convolution_filters(tmp_path / "nowhere.pth")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "cnn.onnx").write_bytes(b"graph")
    with pytest.raises(
        InputError, match=r"cnn.onnx is not a supported weights file; supported suffixes are .safetensors, .pt, .pth"
    ):
        convolution_filters(tmp_path / "cnn.onnx")


def test_a_file_without_convolution_over_colours(tmp_path: Path) -> None:
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


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "cnn.pth")
    with pytest.raises(InputError, match="cannot be read without running pickled code"):
        convolution_filters(tmp_path / "cnn.pth")


# low_frequency_share: against a cosine transform in loops, and closed forms


def cosine_wave(rows: int, cols: int, down: int, across: int) -> NDArray[np.float64]:
    """The cosine transform's wave with these numbers of half periods."""
    y, x = np.cos(np.pi * down * (np.arange(rows) + 0.5) / rows), np.cos(np.pi * across * (np.arange(cols) + 0.5) / cols)
    return np.outer(y, x)


def literal_low_frequency_share(filters: NDArray[np.float64]) -> float:
    """The share by projecting every filter on every wave, in loops."""
    *_, rows, cols = filters.shape
    low = total = 0.0
    for down in range(rows):
        for across in range(cols):
            if down == across == 0:
                continue
            wave = cosine_wave(rows, cols, down, across)
            wave /= np.linalg.norm(wave)
            energy = sum(float((picture * wave).sum()) ** 2 for channels in filters for picture in channels)
            total += energy
            if down < math.ceil(rows / 2) and across < math.ceil(cols / 2):
                low += energy
    return low / total


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (4, 3, 11, 11), (3, 1, 4, 7), (2, 3, 1, 6)])
def test_waves_one_at_a_time(shape: tuple[int, ...]) -> None:
    filters = np.random.default_rng(0).normal(size=shape)
    assert low_frequency_share(filters) == pytest.approx(literal_low_frequency_share(filters), rel=1e-12)


def test_single_waves() -> None:
    share = [low_frequency_share(cosine_wave(8, 8, *wave)[None, None]) for wave in ((1, 0), (3, 3), (4, 0), (2, 5), (7, 7))]
    assert share == pytest.approx([1, 1, 0, 0, 0], abs=1e-12)
    both = cosine_wave(8, 8, 1, 2) + 2 * cosine_wave(8, 8, 6, 5)
    assert low_frequency_share(both[None, None]) == pytest.approx(1 / 5)


def test_the_mean_counts_for_nothing_and_scale_for_something() -> None:
    filters = np.random.default_rng(1).normal(size=(4, 3, 8, 8))
    assert low_frequency_share(filters + 100) == pytest.approx(low_frequency_share(filters))
    assert low_frequency_share(-3 * filters) == pytest.approx(low_frequency_share(filters))
    smooth, rough = cosine_wave(8, 8, 1, 1), cosine_wave(8, 8, 7, 7)
    assert low_frequency_share(np.stack([3 * smooth, rough])[:, None]) == pytest.approx(9 / 10)


def test_independent_weights_have_all_frequencies_alike() -> None:
    filters = np.random.default_rng(2).normal(size=(2000, 3, 8, 8))
    assert low_frequency_share(filters) == pytest.approx(15 / 63, abs=0.005)


def test_the_bundled_model_has_the_share_on_its_card() -> None:
    filters = patch_filters(load_model("demo")).filters
    assert low_frequency_share(filters) == pytest.approx(literal_low_frequency_share(filters), rel=1e-12)
    assert low_frequency_share(filters) == pytest.approx(0.71, abs=0.005)


@pytest.mark.parametrize("shape", [(3, 8, 8), (0, 3, 8, 8)])
def test_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"filters have shape \(.*\); they must be \(filter, channel, row, col\), none empty"):
        low_frequency_share(np.zeros(shape))


def test_values_that_are_not_finite() -> None:
    with pytest.raises(InputError, match="filters are not all finite"):
        low_frequency_share(np.full((1, 1, 2, 2), np.nan))


@pytest.mark.parametrize(
    "filters", [np.full((2, 3, 4, 5), 1e9 / 3), np.zeros((1, 1, 4, 5)), np.arange(12.0).reshape(4, 3, 1, 1)]
)
def test_filters_without_variance(filters: NDArray[np.float64]) -> None:
    with pytest.raises(InputError, match=r"the filters, of \d x \d pixels, are constant over space"):
        low_frequency_share(filters)
