"""Principal components of the patch embedding against the literal reference and scikit-learn."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from sklearn.decomposition import PCA
from torch import nn

from tests import reference
from tests.example_models import FAMILIES, small_vit
from vit_probe import InputError, load_result, patch_filters
from vit_probe.measures import PatchFiltersResult
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


def test_signs_do_not_hang_on_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_twenty_eight_components_unless_told_otherwise() -> None:
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


def test_gray_filters() -> None:
    assert patch_filters(_conv(torch.randn(8, 1, 3, 3)), components=2).filters.shape == (2, 1, 3, 3)


# The result


def test_dataframe_has_a_row_a_weight() -> None:
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


def test_no_convolution_over_colours() -> None:
    with pytest.raises(InputError, match="Sequential has no convolution over 1 or 3 colour channels"):
        patch_filters(nn.Sequential(nn.Linear(3, 3), nn.Conv2d(8, 8, 3)))
