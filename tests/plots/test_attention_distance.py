from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from vit_probe.errors import InputError
from vit_probe.plots import plot_attention_distance, plot_sorted_heads


def _dots(axes: Axes) -> PathCollection:
    dots = axes.collections[-1]
    assert isinstance(dots, PathCollection)
    return dots


def test_one_dot_per_head_at_its_layer_and_distance(frame: pd.DataFrame) -> None:
    dots = _dots(plot_attention_distance(frame))
    np.testing.assert_array_equal(dots.get_offsets(), frame[["layer", "distance"]])
    np.testing.assert_array_equal(dots.get_array(), frame["patch_mass"])
    assert dots.get_clim() == (0, 1)


def test_labels_limits_and_whole_layers(frame: pd.DataFrame) -> None:
    axes = plot_attention_distance(frame)
    axes.figure.draw_without_rendering()
    assert axes.get_xlabel() == "Network depth (layer)"
    assert axes.get_ylabel() == "Mean attention distance (pixels)"
    assert axes.get_ylim()[0] == 0
    assert [label.get_text() for label in axes.get_xticklabels() if 0 <= label.get_position()[0] <= 5] == list("012345")
    (bar,) = axes.child_axes
    assert bar.get_ylabel() == "Attention on patches"
    assert bar.get_ylim() == (0, 1)


@pytest.mark.parametrize("inches", [2.5, 8.0])
def test_layer_numbers_never_run_into_each_other(frame: pd.DataFrame, inches: float) -> None:
    deep = pd.concat([frame.assign(layer=frame["layer"] + 6 * block) for block in range(8)])
    axes = Figure(figsize=(inches, 2)).subplots()
    plot_attention_distance(deep, ax=axes)
    axes.figure.draw_without_rendering()
    low, high = axes.get_xlim()
    boxes = [label.get_window_extent() for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
    assert len(boxes) >= 4
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_the_uniform_line_is_drawn_and_named(frame: pd.DataFrame) -> None:
    axes = plot_attention_distance(frame)
    (line,) = axes.get_lines()
    np.testing.assert_array_equal(line.get_ydata(), 116.5)
    assert line.get_linestyle() == "--"
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["uniform attention"]


@pytest.mark.parametrize("spread", [False, True])
def test_the_legend_covers_no_mark(frame: pd.DataFrame, spread: bool) -> None:
    high = frame.assign(distance=130.0, std=15.0)
    axes = plot_attention_distance(high, spread=spread)
    axes.figure.draw_without_rendering()
    legend = axes.get_legend()
    assert legend is not None
    bottom = legend.get_window_extent().y0
    assert axes.transData.transform((0, 145.0 if spread else 130.0))[1] < bottom
    assert axes.transData.transform((0, 116.5))[1] < bottom


@pytest.mark.parametrize("layout", [None, "constrained"])
@pytest.mark.parametrize("inches", [(3.25, 2.0), (6.75, 4.0)])
def test_the_legend_stays_within_small_axes(frame: pd.DataFrame, inches: tuple[float, float], layout: Any) -> None:
    figure = Figure(figsize=inches, layout=layout)
    panels = figure.subplots(1, 1, squeeze=False) if inches[0] < 4 else figure.subplots(2, 3)
    for axes in panels.flat:
        plot_attention_distance(frame, ax=axes, spread=True)
    figure.draw_without_rendering()
    for axes in panels.flat:
        legend, box = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert box.x0 <= legend.x0 <= legend.x1 <= box.x1
        highest = float((frame["distance"] + frame["std"]).clip(lower=116.5).max())
        assert axes.transData.transform((0, highest))[1] < legend.y0


def test_wide_axes_have_the_legend_in_one_line(frame: pd.DataFrame) -> None:
    axes = plot_attention_distance(frame, spread=True)
    axes.figure.draw_without_rendering()
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["uniform attention", "±1 std over 32 images"]
    first, second = (text.get_window_extent() for text in legend.get_texts())
    assert first.x1 < second.x0


@pytest.mark.parametrize("plot", [plot_attention_distance, plot_sorted_heads])
def test_a_model_of_one_patch_starts_at_zero(frame: pd.DataFrame, plot) -> None:  # type: ignore[no-untyped-def]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes = plot(frame.assign(distance=0.0, std=0.0, uniform_distance=0.0))
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 0


def test_spread_adds_the_deviation_over_images(frame: pd.DataFrame) -> None:
    assert not plot_attention_distance(frame).containers
    axes = plot_attention_distance(frame, spread=True)
    (bars,) = axes.containers
    assert isinstance(bars, ErrorbarContainer)
    assert bars.get_label() == "±1 std over 32 images"
    (lines,) = (artist for artist in axes.collections if isinstance(artist, LineCollection))
    ends = np.array([segment[:, 1] for segment in lines.get_segments()])
    np.testing.assert_allclose(ends, np.stack([frame["distance"] - frame["std"], frame["distance"] + frame["std"]], axis=1))


def test_spread_sets_heads_side_by_side_within_their_layer(frame: pd.DataFrame) -> None:
    offsets = np.asarray(_dots(plot_attention_distance(frame, spread=True)).get_offsets())
    np.testing.assert_array_equal(offsets[:, 1], frame["distance"])
    np.testing.assert_array_equal(offsets[:, 0].round(), frame["layer"])
    assert len(np.unique(offsets[:, 0])) == len(frame)
    np.testing.assert_allclose(offsets[:4, 0].mean(), 0, atol=1e-12)


def test_dots_shrink_where_layers_crowd(frame: pd.DataFrame) -> None:
    deep = pd.concat([frame.assign(layer=frame["layer"] + 6 * block) for block in range(8)])
    narrow = Figure(figsize=(2, 2)).subplots()
    plot_attention_distance(deep, ax=narrow)
    assert _dots(narrow).get_sizes()[0] < _dots(plot_attention_distance(frame)).get_sizes()[0]


def test_a_head_without_a_distance_is_left_out(frame: pd.DataFrame) -> None:
    frame.loc[0, "distance"] = np.nan
    assert plot_attention_distance(frame, spread=True).get_ylim()[1] > 116.5
    assert plot_sorted_heads(frame).get_ylim()[1] > 116.5


@pytest.mark.parametrize("plot", [plot_attention_distance, plot_sorted_heads])
def test_draws_on_the_axes_it_is_given(frame: pd.DataFrame, plot) -> None:  # type: ignore[no-untyped-def]
    axes = Figure().subplots()
    assert plot(frame, ax=axes) is axes
    assert axes.lines


@pytest.mark.parametrize("plot", [plot_attention_distance, plot_sorted_heads])
def test_errors_say_what_arrived(frame: pd.DataFrame, plot) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=r"lacks the columns std, num_images; pass what .* to_dataframe\(\)"):
        plot(frame.drop(columns=["std", "num_images"]))
    with pytest.raises(InputError, match="no rows; measure at least one head"):
        plot(frame.iloc[:0])
    mixed = frame.assign(uniform_distance=np.where(frame["head"] < 3, 116.5, 270.0))
    with pytest.raises(InputError, match=r"several grids \(uniform_distance from 116\.5 to 270\); draw one grid at a time"):
        plot(mixed)


def test_windows_have_their_own_uniform_attention(frame: pd.DataFrame) -> None:
    windows = frame.assign(uniform_distance=np.where(frame["layer"] % 3 == 2, 116.5, 40.0))
    axes = plot_attention_distance(windows)
    (steps,) = [patch for patch in axes.patches if patch.get_label() == "uniform attention"]
    assert isinstance(steps, StepPatch)
    np.testing.assert_array_equal(steps.get_data().values, [40, 40, 116.5, 40, 40, 116.5])
    np.testing.assert_array_equal(steps.get_data().edges, np.arange(7) - 0.5)
    assert axes.get_ylim()[1] > 116.5
    *lines, near, far = plot_sorted_heads(windows, layers=[0, 1, 2]).get_lines()
    assert len(lines) == 3
    assert [set(line.get_ydata()) for line in (near, far)] == [{40.0}, {116.5}]


def test_sorted_heads_of_the_first_and_last_layers(frame: pd.DataFrame) -> None:
    axes = plot_sorted_heads(frame)
    *lines, uniform = axes.get_lines()
    assert [line.get_label() for line in lines] == ["layer 0", "layer 1", "layer 4", "layer 5"]
    for layer, line in zip((0, 1, 4, 5), lines, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), np.sort(frame["distance"][frame["layer"] == layer]))
        np.testing.assert_array_equal(line.get_xdata(), range(4))
        assert line.get_marker() not in ("", "None", None)
    assert len({str(line.get_color()) for line in lines}) == 4
    np.testing.assert_array_equal(uniform.get_ydata(), 116.5)
    assert axes.get_xlabel() == "Sorted attention heads"
    assert axes.get_ylabel() == "Mean attention distance (pixels)"
    assert axes.get_ylim()[0] == 0
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [line.get_label() for line in (*lines, uniform)]


def test_sorted_heads_keep_the_order_asked_for(frame: pd.DataFrame) -> None:
    lines = plot_sorted_heads(frame, layers=[3, 2]).get_lines()
    assert [line.get_label() for line in lines] == ["layer 3", "layer 2", "uniform"]


def test_sorted_heads_of_a_shallow_model(frame: pd.DataFrame) -> None:
    lines = plot_sorted_heads(frame[frame["layer"] < 3]).get_lines()
    assert [line.get_label() for line in lines] == ["layer 0", "layer 1", "layer 2", "uniform"]


@pytest.mark.parametrize("layers", [[0, 6], [-1], []])
def test_sorted_heads_of_absent_layers(frame: pd.DataFrame, layers: list[int]) -> None:
    with pytest.raises(InputError, match=r"layers \[.*\] were asked for, but there are layers 0 to 5; name some of those"):
        plot_sorted_heads(frame, layers=layers)
