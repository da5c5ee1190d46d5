from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_probe.errors import InputError
from vit_probe.plots.representation_similarity import (
    SimilarityPanel,
    plot_representation_similarities,
    plot_representation_similarity,
)


def matrix(rows: int = 5, cols: int = 5, least: float = -0.05) -> np.ndarray:
    return np.random.default_rng(0).uniform(least, 1, (rows, cols))


def test_the_first_layers_are_at_the_lower_left() -> None:
    values = matrix(4, 6)
    axes = plot_representation_similarity(values)
    (image,) = axes.images
    np.testing.assert_array_equal(np.asarray(image.get_array()), values)
    assert image.origin == "lower"
    assert axes.get_ylim() == (-0.5, 3.5)
    assert axes.get_xlim() == (-0.5, 5.5)
    assert image.get_clim() == (0, 1)
    assert image.get_cmap().name == "viridis"
    assert axes.get_aspect() == 1


def test_labels_title_and_colour_bar() -> None:
    axes = plot_representation_similarity(matrix(), title="demo", ylabel="Layer of this", xlabel="Layer of that")
    assert axes.get_title() == "demo"
    assert axes.get_ylabel() == "Layer of this"
    assert axes.get_xlabel() == "Layer of that"
    (bar,) = axes.child_axes
    assert bar.get_ylabel() == "Similarity (linear CKA)"
    assert bar.get_ylim() == (0, 1)
    assert not plot_representation_similarity(matrix(), colorbar=False).child_axes


def test_several_maps_side_by_side_share_one_colour_bar() -> None:
    panels = [SimilarityPanel(matrix(), "one"), SimilarityPanel(matrix(3, 3), "two"), SimilarityPanel(matrix(5, 3), "both")]
    figure = plot_representation_similarities(panels)
    assert [axes.get_title() for axes in figure.axes[:3]] == ["one", "two", "both"]
    assert [len(axes.child_axes) for axes in figure.axes[:3]] == [0, 0, 1]
    for axes, panel in zip(figure.axes[:3], panels, strict=True):
        np.testing.assert_array_equal(np.asarray(axes.images[0].get_array()), panel.similarity)


@pytest.mark.parametrize(
    ("least", "darkest"),
    [(-0.3, 0), (0.0, 0), (0.099, 0), (0.3, 0.3), (0.7, 0.7), (0.899, 0.8), (0.9, 0.9), (0.995, 0.9), (1.0, 0.9)],
)
def test_colours_start_at_the_smallest_similarity_rounded_down_to_a_tenth(least: float, darkest: float) -> None:
    values = np.array([[1.0, least], [least, 1.0]])
    axes = plot_representation_similarity(values)
    assert axes.images[0].get_clim() == (darkest, 1)
    assert axes.child_axes[0].get_ylim() == (darkest, 1)
    assert plot_representation_similarity(values.astype(np.float32)).images[0].get_clim() == (darkest, 1)


def test_several_maps_share_their_colours() -> None:
    panels = [SimilarityPanel(np.array([[1.0, least]])) for least in (0.95, 0.63, 0.8)]
    axes = plot_representation_similarities(panels).axes[:3]
    assert [one.images[0].get_clim() for one in axes] == [(0.6, 1)] * 3


def assert_texts_fit(axes: Axes) -> None:
    """Assert that tick labels are whole numbers and do not overlap, and that all labels are inside the figure."""
    figure = axes.figure
    ticks = [text for text in axes.get_xticklabels() if text.get_window_extent().x1 > 0]
    assert all(float(text.get_text().replace("\N{MINUS SIGN}", "-")).is_integer() for text in ticks)
    boxes = [text.get_window_extent() for text in ticks]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *(bar.yaxis.label for bar in axes.child_axes)):
        box = text.get_window_extent()
        assert box.x0 >= -0.5
        assert box.y0 >= -0.5
        assert box.x1 <= figure.bbox.x1 + 0.5
        assert box.y1 <= figure.bbox.y1 + 0.5


@pytest.mark.parametrize("least", [-0.05, 0.95])
@pytest.mark.parametrize("depth", [1, 12, 48])
def test_every_text_is_inside_the_figure_and_ticks_apart(depth: int, least: float) -> None:
    values = matrix(depth, depth, least)
    for title in ("a model", ""):
        axes = plot_representation_similarity(values, title=title, ylabel="Layer of a", xlabel="Layer of b")
        axes.figure.draw_without_rendering()
        assert_texts_fit(axes)
    panels = [SimilarityPanel(values, title) for title in ("a model", "another", "between the two")]
    figure = plot_representation_similarities(panels)
    figure.draw_without_rendering()
    for axes in figure.axes[:3]:
        assert_texts_fit(axes)
    boxes = [axes.get_tightbbox() for axes in figure.axes[:3]]
    assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))


def test_draws_on_the_given_axes_or_figure() -> None:
    axes = Figure().subplots()
    assert plot_representation_similarity(matrix(), ax=axes) is axes
    figure = Figure()
    assert plot_representation_similarities([SimilarityPanel(matrix())], figure=figure) is figure
    assert len(figure.axes[0].images) == 1


def test_values_that_are_not_similarities_raise() -> None:
    with pytest.raises(InputError, match=r"similarity has shape \(2, 3, 4\); it must be \(layer, other_layer\)"):
        plot_representation_similarity(np.zeros((2, 3, 4)))
    for value in (np.nan, 1.5):
        with pytest.raises(InputError, match=r"similarity ranges from .* to (nan|1.5); it must be finite and at most 1, as is"):
            plot_representation_similarity(np.array([[1.0, value]]))
    with pytest.raises(InputError, match="there are no panels to draw; pass at least one"):
        plot_representation_similarities([])
