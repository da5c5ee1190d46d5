from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tests.plots.overlap_checks import assert_inside
from vit_probe.errors import InputError
from vit_probe.plots import FORMATS, plot_filter_panels, plot_patch_filters, save_figure


def _picture(axes: Axes) -> NDArray[np.float64]:
    (image,) = axes.images
    return np.asarray(image.get_array())


def _filters(count: int = 28, channels: int = 3, rows: int = 14, cols: int = 14, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(count, channels, rows, cols))


def test_tiles_are_the_filters_scaled_jointly_over_channels() -> None:
    filters = _filters()
    picture = _picture(plot_patch_filters(filters))
    assert picture.shape == (4 * 15 - 1, 7 * 15 - 1, 3)
    for index, weights in enumerate(filters):
        row, col = divmod(index, 7)
        tile = picture[row * 15 : row * 15 + 14, col * 15 : col * 15 + 14]
        expected = (weights - weights.min()) / (weights.max() - weights.min())
        np.testing.assert_allclose(tile, expected.transpose(1, 2, 0), atol=1e-12)
    assert (picture[14::15] == 1).all()
    assert (picture[:, 14::15] == 1).all()


def test_one_channel_is_drawn_in_grey() -> None:
    picture = _picture(plot_patch_filters(_filters(3, channels=1)))
    assert picture.shape == (14, 44, 3)
    assert np.ptp(picture, axis=2).max() == 0
    assert picture[:, :14].min() == 0


def test_first_layer_of_another_model_with_a_short_last_row() -> None:
    picture = _picture(plot_patch_filters(_filters(10, rows=11, cols=11), columns=8))
    assert picture.shape == (23, 95, 3)
    assert (picture[12:, 24:] == 1).all()
    assert not (picture[12:, 12:23] == 1).all()


def test_pixels_stay_square_where_patches_are_not() -> None:
    axes = plot_patch_filters(_filters(4, rows=8, cols=16), columns=2)
    assert axes.get_aspect() == 1
    assert axes.images[0].get_interpolation() == "nearest"
    assert _picture(axes).shape == (17, 33, 3)
    axes.figure.draw_without_rendering()
    box = axes.get_window_extent()
    np.testing.assert_allclose(box.height / box.width, 17 / 33, rtol=1e-6)


def test_a_constant_filter_is_mid_grey() -> None:
    filters = _filters(2)
    filters[1] = 3.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = _picture(plot_patch_filters(filters))
    assert (picture[:, 15:29] == 0.5).all()
    assert picture[:, :14].max() == 1


def test_the_picture_fills_its_column_and_has_no_axes() -> None:
    axes = plot_patch_filters(_filters())
    assert axes.figure.get_figwidth() == pytest.approx(3.25)
    assert axes.get_title() == ""
    assert len(axes.get_xticks()) == len(axes.get_yticks()) == 0
    assert not any(spine.get_visible() for spine in axes.spines.values())


@pytest.mark.parametrize(("count", "columns"), [(28, None), (383, None), (383, 7), (30, 1)])
@pytest.mark.parametrize("title", ["AlexNet, first layer", "RGB embedding filters (first 28 principal components)", "m" * 40])
def test_the_title_is_whole_and_inside_the_figure(title: str, count: int, columns: int | None) -> None:
    axes = plot_patch_filters(_filters(count, rows=4, cols=4), title=title, columns=columns)
    assert axes.get_title().replace("\n", " ") == title
    axes.figure.draw_without_rendering()
    box = axes.title.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= axes.figure.bbox.x1
    assert box.y1 <= axes.figure.bbox.y1


@pytest.mark.parametrize("columns", [None, 7])
def test_many_filters_still_fit_a_page(columns: int | None) -> None:
    assert plot_patch_filters(_filters(768, rows=4, cols=4), columns=columns).figure.get_figheight() < 9


@pytest.mark.parametrize(("count", "columns"), [(3, 3), (7, 7), (28, 7), (29, 7), (50, 8), (383, 20)])
def test_columns_are_seven_or_make_the_mosaic_about_square(count: int, columns: int) -> None:
    assert _picture(plot_patch_filters(_filters(count, rows=4, cols=4))).shape[1] == columns * 5 - 1


@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (8, 4), (4, 16), (32, 32)])
@pytest.mark.parametrize("count", [29, 64, 383])
def test_many_filters_are_about_as_high_as_wide_at_most(count: int, rows: int, cols: int) -> None:
    height, width = _picture(plot_patch_filters(_filters(count, rows=rows, cols=cols))).shape[:2]
    assert height <= width + 2 * max(rows, cols)


def test_draws_on_the_given_axes() -> None:
    axes = Figure().subplots()
    assert plot_patch_filters(_filters(), ax=axes) is axes
    assert len(axes.images) == 1


def test_other_channels_are_tiles_side_by_side() -> None:
    """In the picture of one filter, and with wider gaps between filters."""
    filters = _filters(3, channels=4, rows=6, cols=5)
    picture = _picture(plot_patch_filters(filters, columns=2))
    assert picture.shape == (6 + 1 + 6, 2 * (4 * 5 + 3) + 4, 3)
    assert np.ptp(picture, axis=2).max() == 0
    for index, weights in enumerate(filters):
        row, col = divmod(index, 2)
        scaled = (weights - weights.min()) / (weights.max() - weights.min())
        for channel in range(4):
            left = col * (4 * 6 - 1 + 4) + channel * 6
            np.testing.assert_allclose(picture[row * 7 : row * 7 + 6, left : left + 5, 0], scaled[channel], atol=1e-12)
    assert (picture[:, 5::6][:, :3] == 1).all()


def test_many_filters_of_many_channels_are_about_square() -> None:
    height, width = _picture(plot_patch_filters(_filters(28, channels=13, rows=8, cols=8))).shape[:2]
    assert 0.4 < height / width < 1.2


def test_three_chosen_channels_are_red_green_and_blue() -> None:
    filters = _filters(5, channels=13)
    picture = _picture(plot_patch_filters(filters, channels=(3, 2, 1)))
    np.testing.assert_array_equal(picture, _picture(plot_patch_filters(filters[:, [3, 2, 1]])))
    np.testing.assert_array_equal(
        _picture(plot_patch_filters(filters, channels=[4])), _picture(plot_patch_filters(filters[:, 4:5]))
    )


@pytest.mark.parametrize("channels", [(0, 1), (0, 1, 13), (-1, 0, 1), ()])
def test_channels_that_cannot_be_drawn(channels: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"channels must be one or three of 0 to 12, got \("):
        plot_patch_filters(_filters(2, channels=13), channels=channels)


@pytest.mark.parametrize("shape", [(28, 588), (0, 3, 8, 8)])
def test_another_shape_raises(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"filters have shape \(.*\); they must be \(filter, channel, row, col\), none empty"):
        plot_patch_filters(np.zeros(shape))


def test_values_that_are_not_finite_raise() -> None:
    filters = _filters(2)
    filters[0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="not finite; check the weights"):
        plot_patch_filters(filters)


def test_zero_columns_raise() -> None:
    with pytest.raises(InputError, match="in 0 columns; pass 1 or more"):
        plot_patch_filters(_filters(2), columns=0)


# Panels


PANELS = {
    "demo\n(28 components)": _filters(rows=8, cols=8),
    "random weights\n(28 components)": _filters(rows=8, cols=8, seed=1),
    "cnn\n(64 filters)": _filters(64, rows=11, cols=11),
}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_mosaic_per_set_in_order(count: int) -> None:
    panels = dict(list(PANELS.items())[:count])
    figure = plot_filter_panels(panels)
    assert [axes.get_title() for axes in figure.axes] == list(panels)
    for axes, filters in zip(figure.axes, panels.values(), strict=True):
        (image,) = axes.images
        np.testing.assert_array_equal(image.get_array(), plot_patch_filters(filters).images[0].get_array())
    assert figure.get_figwidth() == 5.5


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("size", [(8, 8), (4, 16), (16, 4)])
def test_panels_are_not_cut_off_and_do_not_overlap(count: int, size: tuple[int, int]) -> None:
    filters = np.random.default_rng(0).normal(size=(28, 3, *size))
    figure = plot_filter_panels({f"{'long name ' * 6}{index}\n(28 components)": filters for index in range(count)})
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert_inside(figure, boxes)
    assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))  # type: ignore[union-attr]
    assert all(axes.title.get_fontsize() >= 8 for axes in figure.axes)
    assert all(axes.get_title().endswith("\n(28 components)") for axes in figure.axes)


def test_a_long_title_is_shortened_and_dollar_signs_are_no_formula() -> None:
    (axes,) = plot_filter_panels({"$" + "checkpoint " * 9 + "$": _filters()}).axes
    assert axes.get_title().startswith("$checkpoint")
    assert axes.get_title().endswith("…")


def test_draws_on_the_given_figure() -> None:
    figure = Figure(figsize=(8, 3))
    assert plot_filter_panels(PANELS, figure=figure) is figure
    assert len(figure.axes) == 3


def test_saved_panels_are_reproducible(tmp_path: Path) -> None:
    first = save_figure(plot_filter_panels(PANELS), tmp_path / "first", FORMATS)
    second = save_figure(plot_filter_panels(PANELS), tmp_path / "second", FORMATS)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_errors_of_panels() -> None:
    with pytest.raises(InputError, match="there are no filters to draw; pass at least one set, by title"):
        plot_filter_panels({})
    with pytest.raises(InputError, match=r"filters have shape \(2, 5\)"):
        plot_filter_panels({"flat": np.zeros((2, 5))})
