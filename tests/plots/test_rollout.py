from __future__ import annotations

import warnings
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from numpy.typing import NDArray

from tests.plots.overlap_checks import assert_apart, assert_inside
from vit_probe.errors import InputError
from vit_probe.plots import attention_over_black, plot_rollout


def _images(count: int, height: int = 32, width: int = 32) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def _maps(count: int, rows: int = 4, cols: int = 4) -> NDArray[np.float64]:
    return np.random.default_rng(1).random((count, rows, cols))


def _picture(axes: Axes) -> NDArray[Any]:
    (image,) = axes.images
    return np.asarray(image.get_array())


def _headings(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_xticklabels()]


def _titles(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts if isinstance(text, Annotation)]


def test_attention_over_black_shows_the_image_at_the_peak_and_black_at_the_minimum() -> None:
    attention = np.zeros((8, 8))
    attention[2, 5] = 1.0
    image = np.full((64, 64, 3), 255, dtype=np.uint8)
    shown = attention_over_black(image, attention)
    assert shown.shape == (64, 64, 3)
    assert shown.min() == 0
    assert shown.max() == 1
    peak = np.argwhere(shown[..., 0] == shown.max()).mean(axis=0)
    np.testing.assert_allclose(peak, [2.5 * 8 - 0.5, 5.5 * 8 - 0.5])
    assert shown[60, 4].max() == 0


def test_attention_multiplies_every_channel() -> None:
    image, attention = _images(1)[0], _maps(1)[0]
    heat = attention_over_black(np.full_like(image, 255), attention)
    np.testing.assert_allclose(attention_over_black(image, attention), heat * (image / 255.0))


def test_attention_is_smooth_and_keeps_the_order_of_far_patches() -> None:
    attention = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    heat = attention_over_black(np.full((32, 48, 3), 255, dtype=np.uint8), attention)[..., 0]
    assert (np.diff(heat, axis=1) >= -1e-12).all()
    assert np.abs(np.diff(heat, axis=1)).max() < 0.08
    assert heat[16, 4] < 0.05
    assert heat[16, 44] > 0.95


@pytest.mark.parametrize("value", [0.0, 1 / 256])
def test_a_constant_map_leaves_the_image_unchanged(value: float) -> None:
    image = _images(1, 24, 40)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = attention_over_black(image, np.full((3, 5), value))
    np.testing.assert_allclose(shown, image / 255.0)


def test_pairs_hold_the_input_and_the_attention_over_black() -> None:
    images, maps = _images(3, 32, 40), _maps(3, 4, 5)
    axes = plot_rollout(maps, images, columns=1)
    picture = _picture(axes)
    below = (picture.shape[0] - 3 * 32) // 2
    assert picture.shape[1] == 81
    for index in range(3):
        line = picture[index * (32 + below) :][:32]
        np.testing.assert_array_equal(line[:, :40], images[index])
        expected = attention_over_black(images[index], maps[index])
        np.testing.assert_allclose(line[:, 41:] / 255.0, expected, atol=0.5 / 255 + 1e-9)
        assert (line[:, 40] == 255).all()
    assert (picture[32 : 32 + below] == 255).all()
    assert _headings(axes) == ["Input", "Attention"]
    np.testing.assert_array_equal(axes.get_xticks(), [19.5, 60.5])
    assert not axes.child_axes


def test_heatmap_overlays_colours_on_the_grey_image() -> None:
    images = np.full((1, 32, 32, 3), 100, dtype=np.uint8)
    attention = np.zeros((1, 4, 4))
    attention[0, :, 2:] = 1.0
    axes = plot_rollout(attention, images, kind="heatmap")
    overlay = _picture(axes)[:, -32:] / 255.0
    for col, value in ((0, 0.0), (31, 1.0)):
        expected = 0.6 * np.array(mpl.colormaps["viridis"](value)[:3]) + 0.4 * 100 / 255
        np.testing.assert_allclose(overlay[16, col], expected, atol=0.01)
    (bar,) = axes.child_axes
    assert bar.get_ylabel() == "Attention"
    assert [text.get_text() for text in bar.get_yticklabels()] == ["min", "max"]


def test_maps_alone_are_scaled_and_coloured() -> None:
    maps = _maps(4)
    axes = plot_rollout(maps, None, columns=2)
    picture = _picture(axes)
    assert picture.shape == (9, 9, 3)
    scaled = (maps[2] - maps[2].min()) / np.ptp(maps[2])
    expected = mpl.colormaps["viridis"](scaled)[..., :3]
    np.testing.assert_allclose(picture[5:, :4] / 255.0, expected, atol=0.5 / 255 + 1e-9)
    assert _headings(axes) == []
    assert len(axes.child_axes) == 1


def test_several_pairs_per_row_each_with_its_headings() -> None:
    images = _images(3)
    axes = plot_rollout(_maps(3), images, columns=2)
    assert _headings(axes) == ["Input", "Attention"] * 2
    picture = _picture(axes)
    start = round(axes.get_xticks()[2] - 15.5)
    np.testing.assert_array_equal(picture[:32, start : start + 32], images[1])
    np.testing.assert_array_equal(picture[-32:, :32], images[2])
    assert (picture[-32:, start:] == 255).all()


def test_narrow_pairs_share_one_heading() -> None:
    axes = plot_rollout(_maps(64), _images(64), columns=8)
    assert _headings(axes) == ["Pairs of input (left) and attention (right)"]


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (3, 1), (6, 2), (12, 3), (128, 8)])
def test_columns_make_the_figure_about_square(count: int, columns: int) -> None:
    axes = plot_rollout(_maps(count), _images(count, 16, 16))
    width = _picture(axes).shape[1]
    assert width == columns * 33 + (columns - 1) * 2
    assert axes.figure.get_figheight() < 9.5


@pytest.mark.parametrize("titled", [False, True])
@pytest.mark.parametrize("count", [1, 2, 40])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 32), (8, 512), (64, 512), (512, 64), (32, 1)])
def test_pictures_of_every_shape_can_be_drawn(height: int, width: int, count: int, titled: bool) -> None:
    titles = ["title"] * count if titled else None
    for images in (None, _images(count, height, width)):
        axes = plot_rollout(_maps(count, *((height, width) if images is None else (2, 2))), images, titles=titles)
        assert _picture(axes).shape[1] >= width
        assert min(axes.get_position().size) > 0


@pytest.mark.parametrize("shape", [(64, 512), (160, 640), (224, 448), None])
def test_the_bar_of_a_low_picture_is_legible(shape: tuple[int, int] | None) -> None:
    axes = plot_rollout(_maps(1, 2, 32), None if shape is None else _images(1, *shape), kind="heatmap")
    axes.figure.draw_without_rendering()
    (bar,) = axes.child_axes
    boxes = [text.get_window_extent() for text in (*bar.get_yticklabels(), bar.yaxis.label)]
    assert_apart(boxes)
    assert_inside(axes.figure, boxes)


@pytest.mark.parametrize("kind", ["pairs", "heatmap"])
def test_titles_are_below_their_pairs_and_overlap_nothing(kind: Any) -> None:
    axes = plot_rollout(
        _maps(4), _images(4, 40, 60), kind=kind, titles=["one", "$5^ or $6", "three\nlines", "x" * 200], columns=2
    )
    titles = _titles(axes)
    assert titles[:3] == ["one", "$5^ or $6", "three lines"]
    assert titles[3].startswith("xxx")
    assert titles[3].endswith("…")
    figure = axes.figure
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    second = _picture(axes).shape[0] - 40 - 0.5
    top_of_second_line = axes.transData.transform((0, second))[1]
    bottom_of_first_line = axes.transData.transform((0, 39.5))[1]
    assert all(top_of_second_line < box.y0 and box.y1 < bottom_of_first_line for box in boxes[:2])
    assert all(box.y0 >= 0 for box in boxes[2:])
    assert boxes[3].x1 <= axes.get_window_extent().x1 + 1


@pytest.mark.parametrize("kind", ["pairs", "heatmap"])
@pytest.mark.parametrize("count", [1, 5])
def test_every_text_is_inside_the_figure(kind: Any, count: int) -> None:
    axes = plot_rollout(_maps(count), _images(count), kind=kind)
    axes.figure.draw_without_rendering()
    bars = axes.child_axes
    texts = [*axes.get_xticklabels(), *(text for bar in bars for text in (*bar.get_yticklabels(), bar.yaxis.label))]
    assert_inside(axes.figure, (text.get_window_extent() for text in texts))


def test_draws_on_the_given_axes() -> None:
    axes = Figure().subplots()
    assert plot_rollout(_maps(2), _images(2), ax=axes, titles=["a", "b"]) is axes
    assert len(axes.images) == 1
    assert _titles(axes) == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "overlay"}, "rollout cannot be drawn as 'overlay'; choose 'pairs' or 'heatmap'"),
        ({"titles": ["one"]}, "there are 1 titles for 2 maps; pass one title per map"),
        ({"columns": 0}, "cannot draw rollout in 0 columns; pass 1 or more"),
        ({"maps": np.zeros((2, 16))}, r"rollout maps have shape \(2, 16\); they must be \(image, row, col\)"),
        ({"maps": np.full((2, 4, 4), np.nan)}, "rollout maps have values that are not finite; check"),
        ({"images": np.zeros((2, 8, 8, 3))}, r"images are float64 of shape \(2, 8, 8, 3\); they must be uint8"),
        (
            {"images": np.zeros((2, 3, 8, 8), dtype=np.uint8)},
            r"images are uint8 of shape \(2, 3, 8, 8\); they must be uint8, \(image",
        ),
        ({"images": np.zeros((3, 8, 8, 3), dtype=np.uint8)}, "there are 3 images for 2 maps; pass one image per map"),
    ],
)
def test_errors_say_what_arrived(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plot_rollout(**{"maps": _maps(2), "images": _images(2), **arguments})


def test_attention_over_black_of_a_float_image_raises() -> None:
    with pytest.raises(InputError, match="images are float64 of shape"):
        attention_over_black(np.zeros((8, 8, 3)), np.zeros((2, 2)))  # type: ignore[arg-type]
