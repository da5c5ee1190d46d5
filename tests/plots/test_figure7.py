from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tests.plots.overlap_checks import assert_apart, assert_inside
from vit_probe.plots import FORMATS, plot_figure7, save_figure


@pytest.fixture
def filters() -> NDArray[np.float64]:
    return np.random.default_rng(0).normal(size=(28, 3, 14, 14))


@pytest.fixture
def similarity() -> NDArray[np.float64]:
    table = np.random.default_rng(0).normal(size=(49, 5))
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    return (table @ table.T).reshape(7, 7, 7, 7)


def test_panels_are_in_the_order_of_the_paper(
    filters: NDArray[np.float64], similarity: NDArray[np.float64], frame: pd.DataFrame
) -> None:
    figure = plot_figure7(filters, similarity, frame)
    left, centre, right = figure.axes[:3]
    assert left.get_title() == "RGB embedding filters\n(first 28 principal components)"
    assert np.asarray(left.images[0].get_array()).shape == (59, 104, 3)
    assert centre.get_title() == "Position embedding similarity"
    assert centre.child_axes[0].get_ylabel() == "Cosine similarity"
    assert right.get_xlabel() == "Network depth (layer)"
    np.testing.assert_array_equal(right.collections[0].get_offsets(), frame[["layer", "distance"]])
    legend = right.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["uniform attention"]


@pytest.mark.parametrize("with_table", [True, False])
def test_nothing_is_cut_off_and_nothing_overlaps(
    filters: NDArray[np.float64], similarity: NDArray[np.float64], frame: pd.DataFrame, with_table: bool
) -> None:
    figure = plot_figure7(filters, similarity if with_table else None, frame)
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes[:3]]
    assert_inside(figure, boxes)
    assert boxes[0].x1 <= boxes[1].x0
    assert boxes[1].x1 <= boxes[2].x0
    sizes = [
        text.get_fontsize() for axes in figure.axes[:3] for text in (axes.title, axes.xaxis.label, *axes.get_yticklabels())
    ]
    assert min(sizes) >= 8


def test_a_model_without_position_embeddings_has_a_message_instead(filters: NDArray[np.float64], frame: pd.DataFrame) -> None:
    centre = plot_figure7(filters[:5], None, frame).axes[1]
    assert centre.get_title() == "Position embedding similarity"
    assert not centre.images
    assert [text.get_text() for text in centre.texts] == ["Positions of this model\ncannot be compared."]


def test_the_title_of_the_similarity(
    filters: NDArray[np.float64], similarity: NDArray[np.float64], frame: pd.DataFrame
) -> None:
    for given in (similarity, None):
        sheet = plot_figure7(filters[:5], given, frame, similarity_title="Another kind")
        assert sheet.axes[1].get_title() == "Another kind"


def test_the_title_counts_the_components(
    filters: NDArray[np.float64], similarity: NDArray[np.float64], frame: pd.DataFrame
) -> None:
    assert "first 5 principal" in plot_figure7(filters[:5], similarity, frame).axes[0].get_title()


def test_the_title_of_one_component_is_singular(filters: NDArray[np.float64], frame: pd.DataFrame) -> None:
    assert plot_figure7(filters[:1], None, frame).axes[0].get_title() == "RGB embedding filters\n(first principal component)"


def test_the_bar_of_a_low_grid_is_legible(filters: NDArray[np.float64], frame: pd.DataFrame) -> None:
    figure = plot_figure7(filters, np.ones((2, 32, 2, 32)), frame)
    figure.draw_without_rendering()
    (bar,) = figure.axes[1].child_axes
    boxes = [text.get_window_extent() for text in (*bar.get_yticklabels(), bar.yaxis.label, figure.axes[1].title)]
    assert_apart(boxes)


def test_draws_on_the_given_figure(filters: NDArray[np.float64], similarity: NDArray[np.float64], frame: pd.DataFrame) -> None:
    figure = Figure(figsize=(10, 4))
    assert plot_figure7(filters, similarity, frame, figure=figure) is figure
    assert len(figure.axes) >= 3


def test_saved_files_are_reproducible(
    filters: NDArray[np.float64], similarity: NDArray[np.float64], frame: pd.DataFrame, tmp_path: Path
) -> None:
    first = save_figure(plot_figure7(filters, similarity, frame), tmp_path / "first", FORMATS)
    second = save_figure(plot_figure7(filters, similarity, frame), tmp_path / "second", FORMATS)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
