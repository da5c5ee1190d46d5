from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from vit_probe.errors import InputError
from vit_probe.plots.attention_distance import plot_attention_distances


def _several(frame: pd.DataFrame, count: int) -> dict[str, pd.DataFrame]:
    """Tables that differ in their distances."""
    return {f"epoch {index}": frame.assign(distance=frame.distance + 7 * index) for index in range(count)}


def test_one_panel_per_table_with_its_dots_and_title(frame: pd.DataFrame) -> None:
    frames = _several(frame, 3)
    figure = plot_attention_distances(frames)
    assert [axes.get_title() for axes in figure.axes] == list(frames)
    for axes, table in zip(figure.axes, frames.values(), strict=True):
        np.testing.assert_array_equal(axes.collections[-1].get_offsets(), table[["layer", "distance"]])
    edges = [axes.get_position() for axes in figure.axes]
    assert all(left.x1 < right.x0 for left, right in pairwise(edges))
    assert np.ptp([edge.width for edge in edges]) < 1e-9


def test_panels_share_the_vertical_axis_legend_and_colour_bar(frame: pd.DataFrame) -> None:
    figure = plot_attention_distances({"far": frame, "near": frame.assign(distance=frame.distance / 4, uniform_distance=30.0)})
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    assert figure.axes[1].get_ylim()[0] == 0
    assert figure.axes[1].get_ylim()[1] > 116.5
    assert [list(axes.lines[0].get_ydata()) for axes in figure.axes] == [[116.5, 116.5], [30.0, 30.0]]
    assert [axes.get_ylabel() for axes in figure.axes] == ["Mean attention distance (pixels)", ""]
    assert [axes.get_legend() is not None for axes in figure.axes] == [True, False]
    assert [len(axes.child_axes) for axes in figure.axes] == [0, 1]
    assert figure.axes[-1].child_axes[0].get_ylabel() == "Attention on patches"
    figure.draw_without_rendering()
    assert not any(label.get_visible() for label in figure.axes[1].get_yticklabels())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_texts_are_apart_and_inside(frame: pd.DataFrame, count: int) -> None:
    figure = plot_attention_distances(_several(frame, count))
    figure.draw_without_rendering()
    (bar,) = figure.axes[-1].child_axes
    first = figure.axes[0]
    texts = [*(axes.title for axes in figure.axes), *(axes.xaxis.label for axes in figure.axes), first.yaxis.label]
    texts += [bar.yaxis.label, *bar.get_yticklabels(), *first.get_legend().get_texts()]
    for axes in figure.axes:
        low, high = axes.get_xlim()
        texts += [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    for box in boxes:
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1
    assert sum(bool(axes.get_xlabel()) for axes in figure.axes) == (1 if count == 5 else count)
    assert figure.bbox.width / figure.dpi == pytest.approx(6.75 if count == 5 else 5.5)


@pytest.mark.parametrize("highest", [0, 1])
def test_the_legend_covers_no_dot(frame: pd.DataFrame, highest: int) -> None:
    frames = [frame.assign(distance=130.0 if index == highest else 60.0) for index in range(2)]
    figure = plot_attention_distances({"a": frames[0], "b": frames[1]})
    figure.draw_without_rendering()
    first = figure.axes[0]
    assert first.transData.transform((0, max(frames[0].distance.max(), 116.5)))[1] < first.get_legend().get_window_extent().y0


def test_draws_in_the_part_of_a_figure_it_is_given(frame: pd.DataFrame) -> None:
    whole = Figure(figsize=(6, 6))
    above, _ = whole.subfigures(2, 1)
    assert plot_attention_distances(_several(frame, 2), figure=above) is above
    assert len(above.axes) == 2
    assert min(axes.get_window_extent().y0 for axes in above.axes) > whole.bbox.y1 / 2


def test_errors_say_what_arrived(frame: pd.DataFrame) -> None:
    with pytest.raises(InputError, match="there is no table of attention distances to draw; give at least one, by title"):
        plot_attention_distances({})
    with pytest.raises(InputError, match="lacks the columns std"):
        plot_attention_distances({"complete": frame, "incomplete": frame.drop(columns="std")})
