from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tests.plots.layout import assert_inside
from vit_probe.errors import InputError
from vit_probe.plots import FORMATS, plot_patch_filters, save_figure
from vit_probe.plots.patch_filters import plot_filter_panels


def _filters(count: int = 28, size: int = 8, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(count, 3, size, size))


PANELS = {
    "demo\n(28 components)": _filters(),
    "random weights\n(28 components)": _filters(seed=1),
    "cnn\n(64 filters)": _filters(64, 11),
}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_mosaic_a_set_in_order(count: int) -> None:
    panels = dict(list(PANELS.items())[:count])
    figure = plot_filter_panels(panels)
    assert [axes.get_title() for axes in figure.axes] == list(panels)
    for axes, filters in zip(figure.axes, panels.values(), strict=True):
        (image,) = axes.images
        np.testing.assert_array_equal(image.get_array(), plot_patch_filters(filters).images[0].get_array())
    assert figure.get_figwidth() == 5.5


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("size", [(8, 8), (4, 16), (16, 4)])
def test_nothing_is_cut_off_and_nothing_overlaps(count: int, size: tuple[int, int]) -> None:
    filters = np.random.default_rng(0).normal(size=(28, 3, *size))
    figure = plot_filter_panels({f"{'long name ' * 6}{index}\n(28 components)": filters for index in range(count)})
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert_inside(figure, boxes)
    assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))  # type: ignore[union-attr]
    assert all(axes.title.get_fontsize() >= 8 for axes in figure.axes)
    assert all(axes.get_title().endswith("\n(28 components)") for axes in figure.axes)


def test_a_long_name_is_shortened_and_signs_are_no_formulas() -> None:
    (axes,) = plot_filter_panels({"$" + "checkpoint " * 9 + "$": _filters()}).axes
    assert axes.get_title().startswith("$checkpoint")
    assert axes.get_title().endswith("…")


def test_draws_on_the_figure_it_is_given() -> None:
    figure = Figure(figsize=(8, 3))
    assert plot_filter_panels(PANELS, figure=figure) is figure
    assert len(figure.axes) == 3


def test_the_figure_is_saved_alike_every_time(tmp_path: Path) -> None:
    first = save_figure(plot_filter_panels(PANELS), tmp_path / "first", FORMATS)
    second = save_figure(plot_filter_panels(PANELS), tmp_path / "second", FORMATS)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_errors_say_what_arrived() -> None:
    with pytest.raises(InputError, match="there are no filters to draw; give at least one set, by title"):
        plot_filter_panels({})
    with pytest.raises(InputError, match=r"filters have shape \(2, 5\)"):
        plot_filter_panels({"flat": np.zeros((2, 5))})
