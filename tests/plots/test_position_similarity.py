from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vit_probe.errors import InputError
from vit_probe.plots import plot_position_similarity


def _similarity(rows: int, cols: int) -> NDArray[np.float64]:
    table = np.random.default_rng(0).normal(size=(rows * cols, 5))
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    return (table @ table.T).reshape(rows, cols, rows, cols)


def _labels(axes: Axes) -> tuple[list[str], list[str]]:
    return [text.get_text() for text in axes.get_yticklabels()], [text.get_text() for text in axes.get_xticklabels()]


def test_a_tile_a_patch_with_white_gaps() -> None:
    similarity = _similarity(7, 7)
    axes = plot_position_similarity(similarity)
    (image,) = axes.images
    picture = np.ma.asarray(image.get_array())
    assert picture.shape == (55, 55)
    for row in range(7):
        for col in range(7):
            np.testing.assert_array_equal(picture[row * 8 : row * 8 + 7, col * 8 : col * 8 + 7], similarity[row, col])
    assert np.ma.getmaskarray(picture)[7::8].all()
    assert np.ma.getmaskarray(picture).sum() == 55 * 55 - 7**4
    assert image.get_cmap().name == "viridis"
    assert image.get_clim() == (-1, 1)
    np.testing.assert_array_equal(image.to_rgba(picture)[7, 0], [1, 1, 1, 1])


def test_labels_title_and_colour_bar() -> None:
    axes = plot_position_similarity(_similarity(7, 7))
    assert axes.get_title() == "Position embedding similarity"
    assert axes.get_xlabel() == "Input patch column"
    assert axes.get_ylabel() == "Input patch row"
    (bar,) = axes.child_axes
    assert bar.get_ylabel() == "Cosine similarity"
    assert bar.get_ylim() == (-1, 1)
    np.testing.assert_array_equal(bar.get_yticks(), [-1, 1])


def test_without_colour_bar() -> None:
    assert not plot_position_similarity(_similarity(3, 3), colorbar=False).child_axes


def test_ticks_number_patches_from_one_at_the_tiles_centres() -> None:
    axes = plot_position_similarity(_similarity(7, 7))
    assert _labels(axes) == (list("1234567"), list("1234567"))
    np.testing.assert_array_equal(axes.get_xticks(), 3 + 8 * np.arange(7))
    np.testing.assert_array_equal(axes.get_yticks(), 3 + 8 * np.arange(7))


def test_a_large_grid_shows_evenly_spaced_tiles() -> None:
    similarity = _similarity(37, 37)
    axes = plot_position_similarity(similarity)
    expected = ["1", "7", "13", "19", "25", "31", "37"]
    assert _labels(axes) == (expected, expected)
    picture = np.ma.asarray(axes.images[0].get_array())
    assert picture.shape == (7 * 40 - 3, 7 * 40 - 3)
    np.testing.assert_array_equal(picture[40:77, 80:117], similarity[6, 12])
    np.testing.assert_array_equal(picture[-37:, -37:], similarity[36, 36])


@pytest.mark.parametrize(("side", "shown"), [(14, 14), (15, 8), (16, 6), (24, 8)])
def test_how_many_tiles_are_shown(side: int, shown: int) -> None:
    similarity = np.zeros((side, 1, side, 1))
    similarity[:, 0] = np.linspace(0, 1, side)[:, None, None]
    picture = np.ma.asarray(plot_position_similarity(similarity).images[0].get_array())
    values = np.unique(picture.compressed())
    assert len(values) == shown
    assert (values[0], values[-1]) == (0, 1)


def test_tiles_limits_each_side_and_keeps_both_ends() -> None:
    axes = plot_position_similarity(_similarity(5, 9), tiles=3)
    assert _labels(axes) == (["1", "3", "5"], ["1", "5", "9"])
    axes = plot_position_similarity(_similarity(4, 4), tiles=9)
    assert _labels(axes)[0] == list("1234")


def test_a_grid_that_is_not_square() -> None:
    similarity = _similarity(2, 5)
    axes = plot_position_similarity(similarity)
    picture = np.ma.asarray(axes.images[0].get_array())
    assert picture.shape == (2 * 3 - 1, 5 * 6 - 1)
    np.testing.assert_array_equal(picture[3:5, 18:23], similarity[1, 3])
    assert axes.get_aspect() == 1


@pytest.mark.parametrize(("rows", "cols"), [(7, 7), (14, 14), (3, 12), (12, 3)])
def test_every_text_is_inside_the_figure_and_ticks_apart(rows: int, cols: int) -> None:
    axes = plot_position_similarity(_similarity(rows, cols))
    figure = axes.figure
    figure.draw_without_rendering()
    (bar,) = axes.child_axes
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label, bar.yaxis.label, *bar.get_yticklabels()]
    for box in (text.get_window_extent() for text in texts):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
    across = [text.get_window_extent() for text in axes.get_xticklabels()]
    down = [text.get_window_extent() for text in axes.get_yticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(across))
    assert all(upper.y0 > lower.y1 for upper, lower in pairwise(down))


@pytest.mark.parametrize(("rows", "cols"), [(2, 32), (1, 12)])
def test_the_bar_of_a_low_grid_is_legible(rows: int, cols: int) -> None:
    axes = plot_position_similarity(_similarity(rows, cols))
    axes.figure.draw_without_rendering()
    (bar,) = axes.child_axes
    boxes = [text.get_window_extent() for text in (*bar.get_yticklabels(), bar.yaxis.label)]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_draws_on_the_axes_it_is_given() -> None:
    axes = Figure().subplots()
    assert plot_position_similarity(_similarity(3, 3), ax=axes) is axes
    assert len(axes.images) == 1


@pytest.mark.parametrize("shape", [(49, 49), (7, 5, 5, 7), (0, 0, 0, 0)])
def test_refuses_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        InputError, match=r"similarity has shape \(.*\); it must be \(row, col, row, col\), the same grid twice"
    ):
        plot_position_similarity(np.zeros(shape))


@pytest.mark.parametrize("value", [7.5, np.nan])
def test_refuses_what_is_no_cosine(value: float) -> None:
    similarity = np.zeros((2, 2, 2, 2))
    similarity[0, 0, 0, 0] = value
    with pytest.raises(InputError, match=r"similarity ranges from .* to (7\.5|nan); cosines lie in \[-1, 1\]: divide"):
        plot_position_similarity(similarity)


def test_refuses_a_single_tile() -> None:
    with pytest.raises(InputError, match="cannot show 1 tiles a side; give 2 or more"):
        plot_position_similarity(_similarity(3, 3), tiles=1)
