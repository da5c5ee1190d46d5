from __future__ import annotations

import warnings

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vit_probe.errors import InputError
from vit_probe.plots import plot_patch_filters


def _picture(axes: Axes) -> NDArray[np.float64]:
    (image,) = axes.images
    return np.asarray(image.get_array())


def _filters(count: int = 28, channels: int = 3, rows: int = 14, cols: int = 14) -> NDArray[np.float64]:
    return np.random.default_rng(0).normal(size=(count, channels, rows, cols))


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


def test_one_channel_is_drawn_grey() -> None:
    picture = _picture(plot_patch_filters(_filters(3, channels=1)))
    assert picture.shape == (14, 44, 3)
    assert np.ptp(picture, axis=2).max() == 0
    assert picture[:, :14].min() == 0


def test_first_layer_of_another_model_with_a_short_last_line() -> None:
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
def test_columns_are_seven_or_what_makes_a_square(count: int, columns: int) -> None:
    assert _picture(plot_patch_filters(_filters(count, rows=4, cols=4))).shape[1] == columns * 5 - 1


@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (8, 4), (4, 16), (32, 32)])
@pytest.mark.parametrize("count", [29, 64, 383])
def test_many_filters_are_about_as_high_as_wide_at_most(count: int, rows: int, cols: int) -> None:
    height, width = _picture(plot_patch_filters(_filters(count, rows=rows, cols=cols))).shape[:2]
    assert height <= width + 2 * max(rows, cols)


def test_draws_on_the_axes_it_is_given() -> None:
    axes = Figure().subplots()
    assert plot_patch_filters(_filters(), ax=axes) is axes
    assert len(axes.images) == 1


@pytest.mark.parametrize("shape", [(28, 588), (4, 2, 8, 8), (0, 3, 8, 8)])
def test_refuses_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        InputError, match=r"filters have shape \(.*\); they must be \(filter, channel, row, col\).* 1 or 3 channels"
    ):
        plot_patch_filters(np.zeros(shape))


def test_refuses_values_that_are_not_finite() -> None:
    filters = _filters(2)
    filters[0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="not finite; check the weights"):
        plot_patch_filters(filters)


def test_refuses_no_columns() -> None:
    with pytest.raises(InputError, match="in 0 columns; give 1 or more"):
        plot_patch_filters(_filters(2), columns=0)
