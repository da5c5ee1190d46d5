from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from vit_probe.errors import InputError
from vit_probe.plots.token_norms import plot_token_norms

EDGES = 2.0 ** np.arange(2, 11)


def tables(layers: int = 6, artifacts: tuple[int, ...] = (3, 4, 5)) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Layers of 100 tokens in 8 bins; some layers have artifacts in the last bin."""
    rows, summary = [], []
    for layer in range(layers):
        counts = np.array([0, 10, 60, 28, 0, 0, 0, 2 if layer in artifacts else 0])
        counts[2] += 100 - counts.sum()
        rows += [
            {"layer": layer, "norm_from": low, "norm_to": high, "tokens": count, "part": count / 100}
            for (low, high), count in zip(pairwise(EDGES), counts, strict=True)
        ]
        found = layer in artifacts
        summary.append(
            {
                "layer": layer,
                "median": 20.0 + layer,
                "threshold": 300.0 + layer if found else np.nan,
                "artifacts": 0.0 + (0.02 + layer / 1000) * found,
            }
        )
    return pd.DataFrame(rows), pd.DataFrame(summary)


def test_one_column_per_layer_with_empty_bins_masked() -> None:
    histogram, layers = tables()
    axes = plot_token_norms(histogram.sample(frac=1, random_state=0), layers)
    mesh = axes.collections[0]
    fractions = np.ma.asarray(mesh.get_array()).reshape(8, 6)
    expected = histogram["part"].to_numpy().reshape(6, 8).T
    np.testing.assert_allclose(fractions.filled(0), expected)
    assert (np.ma.getmaskarray(fractions) == (expected == 0)).all()
    np.testing.assert_allclose(axes.get_ylim(), [4, 1024])
    assert axes.get_yscale() == "log"
    assert axes.get_xlim() == (-0.5, 5.5)
    assert mesh.get_cmap().name == "viridis"


def test_labels_and_colour_bar() -> None:
    axes = plot_token_norms(*tables())
    assert axes.get_xlabel() == "Network depth (layer)"
    assert axes.get_ylabel() == "Norm of patch tokens"
    bar, *_ = (child for child in axes.child_axes if child.get_ylabel())
    assert bar.get_ylabel() == "Fraction of the layer's tokens"
    assert bar.get_yscale() == "log"


def test_medians_and_thresholds() -> None:
    histogram, layers = tables()
    axes = plot_token_norms(histogram, layers)
    _, dots, lines = axes.collections
    np.testing.assert_allclose(dots.get_offsets(), layers[["layer", "median"]])
    assert isinstance(lines, LineCollection)
    segments = [segment.tolist() for segment in lines.get_segments()]
    assert segments == [[[layer - 0.5, 300 + layer], [layer + 0.5, 300 + layer]] for layer in (3, 4, 5)]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["median", "threshold"]


def percentages(axes: Axes) -> dict[float, str]:
    """Numbers above the axes, by layer."""
    axes.figure.draw_without_rendering()
    tops = [child for child in axes.child_axes if child.get_xlabel().startswith("Artifacts")]
    return {tick.get_loc(): tick.label2.get_text() for top in tops for tick in top.xaxis.get_major_ticks()}


def test_percentages_are_above_the_layers_with_artifacts() -> None:
    assert percentages(plot_token_norms(*tables())) == {3: "2.3", 4: "2.4", 5: "2.5"}


def test_without_artifacts_there_is_neither_threshold_nor_percentage() -> None:
    axes = plot_token_norms(*tables(artifacts=()))
    assert len(axes.collections) == 2
    assert percentages(axes) == {}
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["median"]


@pytest.mark.parametrize("layers", [1, 12, 48])
def test_every_text_is_inside_the_figure_and_numbers_are_apart(layers: int) -> None:
    axes = plot_token_norms(*tables(layers, artifacts=tuple(range(layers // 2, layers))))
    figure = axes.figure
    figure.draw_without_rendering()
    for child in (axes, *axes.child_axes):
        boxes = [text.get_window_extent() for text in child.get_xticklabels() if text.get_text()]
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
        low, high = child.get_ylim()
        ticks = [text for text in child.get_yticklabels() if low <= text.get_position()[1] <= high]
        for text in (child.xaxis.label, child.yaxis.label, *ticks):
            box = text.get_window_extent()
            if text.get_text() and child.yaxis.get_visible():
                assert box.x0 >= -0.5
                assert box.x1 <= figure.bbox.x1 + 0.5
                assert box.y1 <= figure.bbox.y1 + 0.5


def test_numbers_on_the_axis_of_norms() -> None:
    axes = plot_token_norms(*tables())
    axes.figure.draw_without_rendering()
    shown = [text.get_text() for text in axes.get_yticklabels()]
    assert {"10", "50", "200"} <= set(shown)


def test_draws_on_the_given_axes() -> None:
    axes = Figure().subplots()
    assert plot_token_norms(*tables(), ax=axes) is axes


def test_wrong_tables_raise() -> None:
    histogram, layers = tables()
    with pytest.raises(InputError, match=r"the histogram of token norms lacks the columns norm_to, part; pass histogram\(\)"):
        plot_token_norms(histogram.drop(columns=["norm_to", "part"]), layers)
    with pytest.raises(InputError, match=r"the table of token norms lacks the columns threshold; pass histogram\(\)"):
        plot_token_norms(histogram, layers.drop(columns="threshold"))
    for bad in ((histogram, layers.iloc[1:]), (histogram.iloc[:0], layers.iloc[:0])):
        with pytest.raises(InputError, match="have different layers, or none; pass those of one result"):
            plot_token_norms(*bad)
    with pytest.raises(
        InputError, match="the bins of the histogram differ between layers or leave gaps; all layers must have the same bins"
    ):
        plot_token_norms(histogram.iloc[1:], layers)
    with pytest.raises(InputError, match="differ between layers or leave gaps"):
        plot_token_norms(histogram.assign(norm_to=histogram["norm_to"] * 0.9), layers)
