from __future__ import annotations

from functools import partial
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.plots.overlap_checks import assert_apart
from vit_probe.errors import InputError
from vit_probe.plots import plot_attention_distance, plot_patch_filters, plot_position_similarity, plot_rollout
from vit_probe.plots.comparison import Panel, plot_comparison, plot_range
from vit_probe.plots.representation_similarity import plot_representation_similarity


def _panels(frame: pd.DataFrame, seed: int) -> dict[str, Panel]:
    random = np.random.default_rng(seed)
    table = random.normal(size=(64, 5))
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    photographs = random.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    return {
        "Attention distance (px)": partial(plot_attention_distance, frame),
        "Patch filters": partial(plot_patch_filters, random.normal(size=(28, 3, 8, 8)), title="a title of its own"),
        "Position similarity": partial(plot_position_similarity, (table @ table.T).reshape(8, 8, 8, 8)),
        "Rollout": partial(plot_rollout, random.uniform(size=(2, 8, 8)), photographs),
    }


@pytest.fixture
def rows(frame: pd.DataFrame) -> dict[str, dict[str, Panel]]:
    near = frame.assign(distance=frame["distance"] / 4, uniform_distance=40.0)
    return {"trained": _panels(frame, 0), "random": _panels(near, 1)}


def _grid(figure: Figure, columns: int) -> list[list[Axes]]:
    """Axes row by row; the first of a row holds its name."""
    return [figure.axes[first : first + columns + 1] for first in range(0, len(figure.axes), columns + 1)]


def test_one_row_per_model_and_one_column_per_measure(rows: dict[str, dict[str, Panel]]) -> None:
    figure = plot_comparison(rows)
    trained, random = _grid(figure, 4)
    assert [line[0].texts[0].get_text() for line in (trained, random)] == ["trained", "random"]
    assert [axes.get_title() for axes in trained[1:]] == list(rows["trained"])
    assert [axes.get_title() for axes in random[1:]] == [""] * 4
    assert figure.get_size_inches()[0] == 6.75
    for line in (trained, random):
        assert len(line[1].collections) == 1
        assert all(len(axes.images) == 1 for axes in line[2:])


def test_graphs_of_a_column_share_limits_and_the_label_of_their_axis(rows: dict[str, dict[str, Panel]]) -> None:
    trained, random = _grid(plot_comparison(rows), 4)
    assert trained[1].get_ylim() == random[1].get_ylim()
    assert trained[1].get_ylim()[1] > 116.5
    assert [line[1].get_xlabel() for line in (trained, random)] == ["", "Network depth (layer)"]
    assert all(axes.get_ylabel() == "" for axes in (*trained, *random))


def test_pictures_have_neither_ticks_nor_text(rows: dict[str, dict[str, Panel]]) -> None:
    for line in _grid(plot_comparison(rows), 4):
        for axes in line[2:]:
            assert not axes.get_xticks().size
            assert not axes.get_yticks().size
            assert not axes.texts


def _with_layers(rows: dict[str, dict[str, Panel]]) -> Figure:
    """Layers of low similarity in the first row, and of high similarity in the second."""
    for panels, least in zip(rows.values(), (0.25, 0.97), strict=True):
        similarity = np.linspace(least, 1, 12 * 12).reshape(12, 12)
        panels["Layers' similarity\n(CKA)"] = partial(plot_representation_similarity, similarity)
    return plot_comparison(rows)


def test_layer_against_layer_keeps_the_first_and_last_number(rows: dict[str, dict[str, Panel]]) -> None:
    figure = _with_layers(rows)
    trained, random = (line[5] for line in _grid(figure, 5))
    figure.draw_without_rendering()
    for axes in (trained, random):
        assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "11"]
        assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "11"]
        boxes = [text.get_window_extent() for text in (*axes.get_xticklabels(), *axes.get_yticklabels())]
        assert_apart(boxes)
        (bar,) = axes.child_axes
        assert axes.get_window_extent().x1 < bar.get_window_extent().x0
    assert [axes.get_xlabel() for axes in (trained, random)] == ["", "Layer"]


def test_a_single_layer_has_one_number(rows: dict[str, dict[str, Panel]]) -> None:
    for panels in rows.values():
        panels["Layers"] = partial(plot_representation_similarity, np.ones((1, 1)))
    axes = _grid(plot_comparison(rows), 5)[0][5]
    assert (axes.get_xticks().tolist(), axes.get_yticks().tolist()) == ([0], [0])


def test_pictures_of_a_column_share_colour_limits(rows: dict[str, dict[str, Panel]]) -> None:
    trained, random = _grid(_with_layers(rows), 5)
    for line in (trained, random):
        assert line[3].images[0].get_clim() == (-1, 1)
        assert line[5].images[0].get_clim() == (0.2, 1)
        assert line[5].child_axes[0].get_ylim() == (0.2, 1)


def test_more_measures_than_columns_follow_below(rows: dict[str, dict[str, Panel]]) -> None:
    lines = _grid(plot_comparison(rows, columns=3), 3)
    assert [line[0].texts[0].get_text() for line in lines] == ["trained", "random"] * 2
    assert lines[2][1].get_title() == "Rollout"
    assert [axes.axison for axes in lines[2][1:]] == [True, False, False]


def test_measures_of_one_row_alone_are_left_out(rows: dict[str, dict[str, Panel]]) -> None:
    del rows["random"]["Rollout"]
    trained, _ = _grid(plot_comparison(rows), 3)
    assert [axes.get_title() for axes in trained[1:]] == ["Attention distance (px)", "Patch filters", "Position similarity"]


@pytest.mark.parametrize("columns", [2, 4])
def test_nothing_is_cut_off_and_nothing_overlaps(rows: dict[str, dict[str, Panel]], columns: int) -> None:
    _with_layers(rows)
    figure = plot_comparison(rows, columns=columns)
    figure.draw_without_rendering()
    boxes = [box for axes in figure.axes if (box := axes.get_tightbbox()) is not None]
    for box in boxes:
        assert box.x0 >= -0.5
        assert box.y0 >= -0.5
        assert box.x1 <= figure.bbox.x1 + 0.5
        assert box.y1 <= figure.bbox.y1 + 0.5
    for one, other in combinations(boxes, 2):
        across = min(one.x1, other.x1) - max(one.x0, other.x0)
        down = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert across < 0.5 or down < 0.5


def test_rows_without_a_common_panel_raise(rows: dict[str, dict[str, Panel]]) -> None:
    with pytest.raises(InputError, match="the 2 rows to compare have no panel in common; pass the same panels"):
        plot_comparison({"trained": rows["trained"], "random": {}})
    with pytest.raises(InputError, match="the 0 rows to compare have no panel in common"):
        plot_comparison({})
    with pytest.raises(InputError, match="cannot draw measures in 0 columns; pass 1 or more"):
        plot_comparison(rows, columns=0)


def test_labels_longer_than_their_colour_bar_are_left_out(rows: dict[str, dict[str, Panel]]) -> None:
    for line in _grid(plot_comparison(rows), 4):
        assert line[1].child_axes[0].get_ylabel() == "On patches"
        assert line[3].child_axes[0].get_ylabel() == ""  # "Cosine similarity" is longer than the bar


# Ranges


@pytest.fixture
def ranges() -> pd.DataFrame:
    return pd.DataFrame({"layer": [0, 1, 2], "lowest": [1.0, 2, 3], "median": [2.0, 3, 5], "highest": [4.0, 40, 400]})


def test_range_is_a_line_of_medians_and_a_band(ranges: pd.DataFrame) -> None:
    axes = plot_range(ranges)
    (line,) = axes.get_lines()
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([0, 1, 2], [2, 3, 5])  # type: ignore[union-attr]
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]  # type: ignore[index]
    assert (heights.min(), heights.max()) == (1, 400)
    assert axes.get_yscale() == "log"
    given = Figure().subplots()
    assert plot_range(ranges, ax=given) is given


def test_other_tables_than_ranges_raise(ranges: pd.DataFrame) -> None:
    with pytest.raises(InputError, match="the table of ranges lacks the columns median; pass a table like that of token_norms"):
        plot_range(ranges.drop(columns="median"))
    with pytest.raises(InputError, match="the table of ranges has no rows; measure at least one layer"):
        plot_range(ranges.iloc[:0])
