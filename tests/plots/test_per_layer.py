"""Values per layer: against depth with their interval, or one line per layer along an axis."""

from __future__ import annotations

import warnings

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from vit_probe.errors import InputError
from vit_probe.plots import plot_layers

DEPTH = pd.DataFrame({"layer": [0, 1, 2], "cosine": [0.2, 0.5, 0.4], "confidence": [0.02, 0.05, np.nan]})
SPECTRUM = pd.DataFrame(
    {"layer": [0, 0, 0, 1, 1], "frequency": [0, 1, 2, 0, 1], "amplitude": [0.0, -1.0, -2.0, 0.0, -0.5], "confidence": 0.1}
)


def test_a_line_against_depth_with_its_interval_as_a_band() -> None:
    axes = plot_layers(DEPTH, column="cosine", label="Cosine similarity")
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_xydata(), DEPTH[["layer", "cosine"]])
    (band,) = axes.collections
    assert isinstance(band, PolyCollection)
    corners = {(x, round(y, 9)) for x, y in band.get_paths()[0].vertices.tolist()}
    assert {(0, 0.18), (0, 0.22), (1, 0.45), (1, 0.55), (2, 0.4)} <= corners  # a single image has no interval
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Network depth (layer)", "Cosine similarity")
    low, high = axes.get_xlim()
    assert low < 0
    assert high > 2
    axes.figure.draw_without_rendering()
    assert [text.get_text() for text in axes.get_xticklabels() if 0 <= text.get_position()[0] <= 2] == ["0", "1", "2"]


def test_one_line_per_layer_along_an_axis() -> None:
    axes = plot_layers(SPECTRUM, column="amplitude", label="Log amplitude", axis="frequency")
    assert len(axes.lines) == 2
    for layer, line in enumerate(axes.lines):
        rows = SPECTRUM[SPECTRUM["layer"] == layer]
        np.testing.assert_array_equal(line.get_xydata(), rows[["frequency", "amplitude"]])
    colours = mpl.colormaps["viridis"]
    assert [line.get_color() for line in axes.lines] == [colours(0.0), colours(1.0)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Frequency", "Log amplitude")
    (bar,) = axes.child_axes
    assert bar.get_ylabel() == "Layer"
    assert bar.get_yticks().tolist() == [0, 1]


def test_the_axis_may_have_a_label_of_its_own() -> None:
    axes = plot_layers(SPECTRUM, column="amplitude", label="", axis="frequency", axis_label="Waves across the grid")
    assert axes.get_xlabel() == "Waves across the grid"


@pytest.mark.parametrize("axis", [None, "frequency"])
def test_a_single_layer(axis: str | None) -> None:
    table = SPECTRUM.iloc[:1] if axis is None else SPECTRUM.iloc[:3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes = plot_layers(table, column="amplitude", label="", axis=axis)
    assert len(axes.lines) == 1
    assert [bar.get_yticks().tolist() for bar in axes.child_axes] == ([] if axis is None else [[0]])


def test_draws_on_the_axes_it_is_given() -> None:
    axes = Figure().subplots()
    assert plot_layers(DEPTH, column="cosine", label="", ax=axes) is axes
    assert axes.lines


def test_errors_say_what_arrived() -> None:
    with pytest.raises(InputError, match="table of layers by norm lacks the columns norm; pass what the result of a measure"):
        plot_layers(DEPTH, column="norm", label="")
    with pytest.raises(InputError, match="table of layers by cosine lacks the columns frequency"):
        plot_layers(DEPTH, column="cosine", label="", axis="frequency")
    with pytest.raises(InputError, match="table of layers by cosine has no rows; measure at least one layer"):
        plot_layers(DEPTH.iloc[:0], column="cosine", label="")
