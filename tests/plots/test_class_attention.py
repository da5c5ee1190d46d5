from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tests.plots.overlap_checks import assert_apart, assert_inside
from vit_probe.errors import InputError
from vit_probe.plots import attention_over_black
from vit_probe.plots.class_attention import plot_class_attention


def _images(count: int, height: int = 32, width: int = 32) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def _maps(*shape: int, seed: int = 1) -> NDArray[np.float64]:
    return np.random.default_rng(seed).random((*shape, 4, 4))


def _picture(axes: Axes) -> NDArray[Any]:
    (image,) = axes.images
    return np.asarray(image.get_array())


def _names(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def _tile(axes: Axes, row: int, column: int, rows: int, columns: int, size: tuple[int, int] = (32, 32)) -> NDArray[Any]:
    """One tile of the mosaic."""
    picture = _picture(axes)
    steps = [
        (whole - length) // max(count - 1, 1)
        for whole, length, count in zip(picture.shape, size, (rows, columns), strict=False)
    ]
    top, left = row * steps[0], column * steps[1]
    return picture[top : top + size[0], left : left + size[1]]


def _heat(attention: NDArray[np.float64], patch: tuple[int, int] = (8, 8)) -> NDArray[Any]:
    """Colours from 0 to the map's maximum, one rectangle per patch."""
    return mpl.colormaps["viridis"](np.kron(attention / attention.max(), np.ones(patch)))[..., :3]


def _assert_colours(tile: NDArray[Any], expected: NDArray[Any]) -> None:
    np.testing.assert_allclose(tile / 255.0, expected, atol=0.5 / 255 + 1e-9)


def _black(image: NDArray[np.uint8], attention: NDArray[np.float64]) -> NDArray[Any]:
    return np.rint(attention_over_black(image, attention) * 255)


def test_tiles_are_the_input_then_rollout_then_heads() -> None:
    maps, images, rollout = _maps(2, 3), _images(2), _maps(2, seed=2)
    axes = plot_class_attention(maps, images, rollout=rollout)
    assert _names(axes) == ["Input", "Rollout", "Head 0", "Head 1", "Head 2"]
    for row in range(2):
        np.testing.assert_array_equal(_tile(axes, row, 0, 2, 5), images[row])
        np.testing.assert_array_equal(_tile(axes, row, 1, 2, 5), _black(images[row], rollout[row]))
        for head in range(3):
            _assert_colours(_tile(axes, row, 2 + head, 2, 5), _heat(maps[row, head]))


def test_more_than_eight_heads_are_drawn_in_several_rows() -> None:
    maps, images, rollout = _maps(2, 9), _images(2), _maps(2, seed=2)
    axes = plot_class_attention(maps, images, rollout=rollout)
    assert _names(axes) == ["Input", "Rollout", *(f"Head {head}" for head in range(9))] * 2
    for image in range(2):
        assert (_tile(axes, 2 * image + 1, 0, 4, 7) == 255).all()
        assert (_tile(axes, 2 * image + 1, 6, 4, 7) == 255).all()
        for head in range(9):
            row, column = 2 * image + head // 5, 2 + head % 5
            _assert_colours(_tile(axes, row, column, 4, 7), _heat(maps[image, head]))


def test_attention_to_a_dark_region_is_visible() -> None:
    maps = np.zeros((1, 1, 4, 4))
    maps[0, 0, 2, 1] = 0.3
    dark = np.zeros((1, 32, 32, 3), np.uint8)
    tile = _tile(plot_class_attention(maps, dark), 0, 1, 1, 2)
    brightest = (tile == np.rint(255 * np.array(mpl.colormaps["viridis"](1.0)[:3]))).all(axis=2)
    expected = np.zeros((32, 32), bool)
    expected[16:24, 8:16] = True  # the patch and nothing beside it
    np.testing.assert_array_equal(brightest, expected)


def test_patches_that_do_not_divide_the_photograph() -> None:
    maps = np.array([[[[0.0, 0.5, 1.0]]]])
    tile = _tile(plot_class_attention(maps, _images(1, 32, 32)), 0, 1, 1, 2)
    colours = np.unique(tile.reshape(-1, 3), axis=0, return_counts=True)
    assert len(colours[0]) == 3
    assert sorted(colours[1] // 32) == [10, 11, 11]


@pytest.mark.parametrize("photographs", [True, False])
@pytest.mark.parametrize(("value", "place"), [(0.0, 0.0), (0.25, 1.0)])
def test_constant_maps_are_dark_if_zero_and_bright_otherwise(photographs: bool, value: float, place: float) -> None:
    maps = np.full((1, 1, 4, 4), value)
    axes = plot_class_attention(maps, _images(1) if photographs else None)
    tile = _tile(axes, 0, 1, 1, 2) if photographs else _picture(axes)
    _assert_colours(tile, np.broadcast_to(mpl.colormaps["viridis"](place)[:3], tile.shape))


def test_without_photographs_rollout_is_drawn_in_colours() -> None:
    maps, rollout = _maps(1, 2), _maps(1, seed=2)
    axes = plot_class_attention(maps, None, rollout=rollout)
    assert _names(axes) == ["Rollout", "Head 0", "Head 1"]
    _assert_colours(_tile(axes, 0, 0, 1, 3, (4, 4)), _heat(rollout[0], (1, 1)))
    _assert_colours(_tile(axes, 0, 2, 1, 3, (4, 4)), _heat(maps[0, 1], (1, 1)))


@pytest.mark.parametrize(("count", "label"), [(6, "Attention of a head"), (2, "Attention"), (1, "Attention")])
def test_the_label_of_the_colour_bar_fits_its_height(count: int, label: str) -> None:
    axes = plot_class_attention(_maps(count, 6), _images(count), rollout=_maps(count))
    (bar,) = axes.child_axes
    assert bar.get_ylim() == (0, 1)
    assert [text.get_text() for text in bar.get_yticklabels()] == ["0", "max"]
    assert bar.get_ylabel() == label


def test_heads_are_drawn_in_the_order_given() -> None:
    maps, images = _maps(1, 12), _images(1)
    axes = plot_class_attention(maps, images, heads=[11, 3])
    assert _names(axes) == ["Input", "Head 11", "Head 3"]
    _assert_colours(_tile(axes, 0, 1, 1, 3), _heat(maps[0, 11]))
    assert axes.figure.get_figwidth() == pytest.approx(3.25)


@pytest.mark.parametrize(("count", "heads"), [(1, 1), (6, 6), (1, 8), (2, 12), (3, 16), (4, 24)])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 60), (60, 20)])
def test_names_touch_neither_each_other_nor_a_picture_nor_the_edge(count: int, heads: int, height: int, width: int) -> None:
    axes = plot_class_attention(_maps(count, heads), _images(count, height, width), rollout=_maps(count))
    figure = axes.figure
    assert figure.get_figwidth() <= 5.5 + 1e-6
    assert figure.get_figheight() < 9.5
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    for box in boxes:
        assert box.x0 >= 0
        assert 0 <= box.y0 <= box.y1 <= figure.bbox.y1
    assert_apart(boxes)
    (bar,) = axes.child_axes
    words = [text.get_window_extent() for text in (*bar.get_yticklabels(), bar.yaxis.label)]
    assert_inside(figure, words)
    assert_apart([*boxes, *words])
    assert bar.get_window_extent().x0 > axes.get_window_extent().x1
    blank = (_picture(axes) == 255).all(axis=(1, 2))  # rows of pixels between pictures
    for box in boxes:
        for y in (box.y0 + 1, box.y1 - 1):
            line = axes.transData.inverted().transform((box.x0, y))[1]
            assert line < 0 or blank[round(line)]


def test_more_photographs_than_fit_a_page_make_a_taller_figure() -> None:
    axes = plot_class_attention(_maps(40, 9), _images(40), rollout=_maps(40))
    assert axes.figure.get_figheight() == pytest.approx(80 * (0.3 + 0.21), rel=0.05)


def test_narrow_tiles_are_named_by_the_number_of_the_head_alone() -> None:
    narrow = plot_class_attention(_maps(8, 8), _images(8, 64, 16), rollout=_maps(8))
    first, second, *others = _names(narrow)
    assert others == [*map(str, range(8))]
    assert (first[0], second[0], second[-1]) == ("I", "R", "…")


def test_draws_on_the_given_axes() -> None:
    axes = Figure().subplots()
    assert plot_class_attention(_maps(1, 2), _images(1), ax=axes) is axes
    assert len(axes.images) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"maps": np.zeros((2, 4, 4))}, r"attention maps have shape \(2, 4, 4\); they must be \(image, head, row, col\)"),
        ({"maps": np.full((2, 3, 4, 4), np.nan)}, "attention maps have values that are not finite; check"),
        (
            {"images": _images(3)},
            r"photographs have shape \(3, 32, 32, 3\); to match the attention maps, they must be \(2, any, any",
        ),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, r"photographs have shape \(2, 3, 8, 8\); to match"),
        ({"images": np.zeros((2, 0, 8, 3), np.uint8)}, r"photographs have shape \(2, 0, 8, 3\); to match"),
        ({"images": np.zeros((2, 8, 8, 3))}, "photographs are float64; they must be uint8"),
        ({"rollout": _maps(3)}, r"rollout maps have shape \(3, 4, 4\); to match the attention maps, they must be \(2, 4, 4\)"),
        ({"images": None, "rollout": np.full((2, 4, 4), np.nan)}, "rollout maps have values that are not finite"),
        ({"heads": [3]}, r"cannot draw heads \[3\]: the maps have heads 0 to 2; choose one or more of those"),
        ({"heads": []}, r"cannot draw heads \[\]: "),
    ],
)
def test_errors_say_what_arrived(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plot_class_attention(**({"maps": _maps(2, 3), "images": _images(2)} | arguments))
