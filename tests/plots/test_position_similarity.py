from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from tests.plots.overlap_checks import assert_apart, assert_inside
from vit_probe.errors import InputError
from vit_probe.plots import plot_position_similarity
from vit_probe.plots.position_similarity import plot_position_similarities


def _similarity(rows: int, cols: int) -> NDArray[np.float64]:
    table = np.random.default_rng(0).normal(size=(rows * cols, 5))
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    return (table @ table.T).reshape(rows, cols, rows, cols)


def _labels(axes: Axes) -> tuple[list[str], list[str]]:
    return [text.get_text() for text in axes.get_yticklabels()], [text.get_text() for text in axes.get_xticklabels()]


def test_one_tile_per_patch_with_white_gaps() -> None:
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
def test_number_of_tiles_per_side(side: int, shown: int) -> None:
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
    assert_inside(figure, (text.get_window_extent() for text in texts))
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
    assert_apart(boxes)


def test_draws_on_the_given_axes() -> None:
    axes = Figure().subplots()
    assert plot_position_similarity(_similarity(3, 3), ax=axes) is axes
    assert len(axes.images) == 1


@pytest.mark.parametrize("shape", [(49, 49), (7, 5, 5, 7), (0, 0, 0, 0)])
def test_another_shape_raises(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        InputError, match=r"similarity has shape \(.*\); it must be \(row, col, row, col\), the same grid twice"
    ):
        plot_position_similarity(np.zeros(shape))


@pytest.mark.parametrize("value", [7.5, np.nan])
def test_values_that_are_not_cosines_raise(value: float) -> None:
    similarity = np.zeros((2, 2, 2, 2))
    similarity[0, 0, 0, 0] = value
    with pytest.raises(InputError, match=r"similarity ranges from .* to (7\.5|nan), but cosines lie in \[-1, 1\]; divide"):
        plot_position_similarity(similarity)


def test_a_single_tile_raises() -> None:
    with pytest.raises(InputError, match="cannot draw 1 tiles per side; pass 2 or more"):
        plot_position_similarity(_similarity(3, 3), tiles=1)


def _boxes(texts: Iterable[Text]) -> list[Bbox]:
    return [text.get_window_extent() for text in texts if text.get_text()]


def test_several_maps_side_by_side_share_one_bar() -> None:
    maps = {"first": _similarity(4, 4), "second\n31.2 %": -_similarity(4, 4)}
    figure = plot_position_similarities(maps)
    assert [axes.get_title() for axes in figure.axes] == list(maps)
    for axes, similarity in zip(figure.axes, maps.values(), strict=True):
        picture = np.ma.asarray(axes.images[0].get_array())
        np.testing.assert_array_equal(picture[5:9, 10:14], similarity[1, 2])
        assert axes.images[0].get_clim() == (-1, 1)
    assert [len(axes.child_axes) for axes in figure.axes] == [0, 1]
    assert [axes.get_ylabel() for axes in figure.axes] == ["Input patch row", ""]
    assert [axes.get_xlabel() for axes in figure.axes] == ["Input patch column"] * 2
    left, right = (axes.get_position() for axes in figure.axes)
    assert left.x1 < right.x0
    assert (left.width, left.height) == pytest.approx((right.width, right.height))


def test_a_model_without_position_embeddings_has_a_message_instead() -> None:
    figure = plot_position_similarities({"model": _similarity(4, 4), "none": None})
    drawn, absent = figure.axes
    assert not absent.images
    assert absent.get_title() == "none"
    assert [text.get_text() for text in absent.texts] == ["No positions\nto compare"]
    assert len(drawn.child_axes) == 1  # the colour bar is beside the last map that is drawn
    five = plot_position_similarities({name: None if name == "2" else _similarity(8, 8) for name in "12345"})
    assert [bool(axes.get_xlabel()) for axes in five.axes] == [False, False, True, False, False]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_texts_of_several_maps_are_apart_and_inside(count: int) -> None:
    maps = {f"learned 1-D {index}\n31.2 % top-1": _similarity(8, 8) for index in range(count)}
    if count == 8:
        maps = {str(index): similarity for index, similarity in enumerate(maps.values())}
    figure = plot_position_similarities(maps)
    assert figure.bbox.width / figure.dpi <= 6.75
    figure.draw_without_rendering()
    (bar,) = figure.axes[-1].child_axes
    boxes = _boxes([axes.title for axes in figure.axes]) + _boxes([axes.xaxis.label for axes in figure.axes])
    boxes += _boxes([figure.axes[0].yaxis.label, bar.yaxis.label, *bar.get_yticklabels(), *figure.axes[0].get_yticklabels()])
    boxes += [box for axes in figure.axes for box in _boxes(axes.get_xticklabels())]
    assert_apart(boxes)
    assert_inside(figure, boxes)
    assert sum(bool(axes.get_xlabel()) for axes in figure.axes) == (1 if count > 2 else count)


def test_maps_of_different_grids_have_their_own_numbers() -> None:
    figure = plot_position_similarities({"square": _similarity(4, 4), "low": _similarity(2, 5)})
    figure.draw_without_rendering()
    assert [[text.get_text() for text in axes.get_yticklabels()] for axes in figure.axes] == [list("1234"), list("12")]
    assert all(axes.yaxis.get_major_ticks()[0].label1.get_visible() for axes in figure.axes)
    numbers = _boxes(figure.axes[1].get_yticklabels())
    assert not any(box.overlaps(figure.axes[0].get_window_extent()) for box in numbers)
    same = plot_position_similarities({"one": _similarity(4, 4), "other": _similarity(4, 4)})
    assert not same.axes[1].yaxis.get_major_ticks()[0].label1.get_visible()


def test_several_maps_on_a_subfigure() -> None:
    whole = Figure(figsize=(6, 5))
    _, below = whole.subfigures(2, 1)
    assert plot_position_similarities({"one": _similarity(3, 3), "other": _similarity(3, 3)}, figure=below) is below
    assert len(below.axes) == 2
    assert max(axes.get_window_extent().y1 for axes in below.axes) < whole.bbox.y1 / 2


def test_errors_of_several_maps() -> None:
    for maps in ({}, {"none": None}):
        with pytest.raises(
            InputError, match=f"none of the {len(maps)} models has a map of position similarities to draw; pass at least one"
        ):
            plot_position_similarities(maps)
    with pytest.raises(InputError, match=r"similarity ranges from .* to 7"):
        plot_position_similarities({"good": _similarity(2, 2), "bad": np.full((2, 2, 2, 2), 7.0)})
