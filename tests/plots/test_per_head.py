"""Any value per head: signed ones, tables without uniform attention or masses, a choice of layers."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from vit_probe.errors import InputError
from vit_probe.plots import plot_heads, plot_sorted_heads

SIGNED: dict[str, Any] = {"column": "dx", "label": "Mean offset (pixels)"}


@pytest.fixture
def offsets() -> pd.DataFrame:
    """Three layers of four heads that attend to the left or right."""
    layer, head = (index.ravel() for index in np.indices((3, 4)))
    dx = np.linspace(-30, 20, 12)
    return pd.DataFrame({"layer": layer, "head": head, "dx": dx, "std": 2.0, "uniform_dx": 0.0, "num_images": 8})


def _dots(axes: Axes) -> PathCollection:
    dots = axes.collections[-1]
    assert isinstance(dots, PathCollection)
    return dots


def _offsets(axes: Axes) -> np.ndarray:
    return np.asarray(_dots(axes).get_offsets())


def test_signed_values_lie_on_both_sides_of_a_line_at_zero(offsets: pd.DataFrame) -> None:
    axes = plot_heads(offsets, **SIGNED)
    np.testing.assert_array_equal(_offsets(axes), offsets[["layer", "dx"]])
    low, high = axes.get_ylim()
    assert low < -30
    assert high > 20
    uniform, zero = axes.get_lines()
    assert (uniform.get_label(), set(uniform.get_ydata())) == ("uniform attention", {0.0})
    assert set(zero.get_ydata()) == {0.0}
    assert axes.get_ylabel() == "Mean offset (pixels)"
    axes.figure.draw_without_rendering()
    legend = axes.get_legend()
    assert legend is not None
    assert axes.transData.transform((0, 20))[1] < legend.get_window_extent().y0


def test_values_that_are_not_signed_start_at_zero_without_a_line(offsets: pd.DataFrame) -> None:
    axes = plot_heads(offsets.assign(dx=offsets["dx"].abs()), **SIGNED)
    assert axes.get_ylim()[0] == 0
    assert len(axes.get_lines()) == 1


def test_spread_of_signed_values_is_inside(offsets: pd.DataFrame) -> None:
    low, high = plot_heads(offsets.assign(std=15.0), spread=True, **SIGNED).get_ylim()
    assert low < -45
    assert high > 35


def test_without_masses_dots_have_one_colour_and_no_colour_bar(offsets: pd.DataFrame) -> None:
    axes = plot_heads(offsets, **SIGNED)
    assert axes.child_axes == []
    axes.figure.draw_without_rendering()
    np.testing.assert_array_equal(_dots(axes).get_facecolors(), [to_rgba("#0072B2")])


@pytest.mark.parametrize(("column", "expected"), [("patch_mass", 0.25), ("prefix_mass", 0.75)])
def test_either_mass_colours_the_dots(offsets: pd.DataFrame, column: str, expected: float) -> None:
    axes = plot_heads(offsets.assign(**{column: 0.25}), **SIGNED)
    np.testing.assert_array_equal(_dots(axes).get_array(), [expected] * 12)
    assert [bar.get_ylabel() for bar in axes.child_axes] == ["Attention on patches"]


def test_without_uniform_attention_there_is_no_line_and_no_legend(offsets: pd.DataFrame) -> None:
    plain = offsets.drop(columns="uniform_dx").assign(dx=offsets["dx"].abs())
    axes = plot_heads(plain, **SIGNED)
    assert (axes.get_legend(), list(axes.get_lines()), list(axes.patches)) == (None, [], [])
    assert axes.get_ylim()[1] == pytest.approx(1.05 * 30)
    assert [line.get_label() for line in plot_sorted_heads(plain, **SIGNED).get_lines()] == [f"layer {i}" for i in range(3)]


def test_a_choice_of_layers(offsets: pd.DataFrame) -> None:
    axes = plot_heads(offsets, layers=[2, 0], **SIGNED)
    np.testing.assert_array_equal(_offsets(axes), offsets.loc[offsets["layer"] != 1, ["layer", "dx"]])
    for layers in ([3], [], [-1]):
        with pytest.raises(InputError, match=r"layers \[.*\] were asked for, but there are layers 0 to 2; name some of those"):
            plot_heads(offsets, layers=layers, **SIGNED)


def test_sorted_heads_of_signed_values(offsets: pd.DataFrame) -> None:
    axes = plot_sorted_heads(offsets, **SIGNED)
    *lines, uniform = axes.get_lines()
    for layer, line in enumerate(lines):
        np.testing.assert_array_equal(line.get_ydata(), np.sort(offsets.loc[offsets["layer"] == layer, "dx"]))
    assert set(uniform.get_ydata()) == {0.0}
    assert axes.get_ylim() == pytest.approx((1.05 * -30, 1.05 * 20))


@pytest.mark.parametrize("plot", [plot_heads, plot_sorted_heads])
@pytest.mark.parametrize("value", [-5.0, 0.0, 5.0])
def test_heads_that_are_all_the_same(offsets: pd.DataFrame, plot: Any, value: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = plot(offsets.assign(dx=value, std=0.0), **SIGNED).get_ylim()
    assert low <= min(value, 0) <= max(value, 0) <= high
    assert low < high


@pytest.mark.parametrize("plot", [plot_heads, plot_sorted_heads])
def test_axes_columns_and_rows(offsets: pd.DataFrame, plot: Any) -> None:
    axes = Figure().subplots()
    assert plot(offsets, ax=axes, **SIGNED) is axes
    with pytest.raises(InputError, match=r"table of heads by dx lacks the columns dx; pass what the result of a measure"):
        plot(offsets.drop(columns="dx"), **SIGNED)
    with pytest.raises(InputError, match="table of heads by dx has no rows; measure at least one head"):
        plot(offsets.iloc[:0], **SIGNED)
