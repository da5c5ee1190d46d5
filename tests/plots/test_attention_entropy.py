"""Attention entropy against depth and against distance: what is drawn and where, and the errors."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from tests.plots.overlap_checks import assert_inside
from vit_probe.errors import InputError
from vit_probe.plots.attention_entropy import plot_attention_entropy, plot_entropy_and_distance, plot_entropy_sheet


@pytest.fixture
def entropies() -> pd.DataFrame:
    """Six layers of four heads, in no particular order of entropy."""
    layer, head = (index.ravel() for index in np.indices((6, 4)))
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "layer": layer,
            "head": head,
            "entropy": rng.uniform(0.5, 4.1, 24),
            "std": rng.uniform(0.05, 0.3, 24),
            "prefix_mass": rng.uniform(0, 0.6, 24),
            "self_mass": rng.uniform(0, 0.3, 24),
            "uniform_entropy": np.log(65),
            "num_images": 32,
        }
    )


@pytest.fixture
def joint(entropies: pd.DataFrame) -> pd.DataFrame:
    distance = np.random.default_rng(1).uniform(3, 34, 24)
    return entropies.assign(distance=distance, uniform_distance=33.1)


def _dots(axes: Axes, index: int = -1) -> PathCollection:
    dots = axes.collections[index]
    assert isinstance(dots, PathCollection)
    return dots


# Against depth


def test_one_dot_per_head_at_its_layer_and_entropy(entropies: pd.DataFrame) -> None:
    axes = plot_attention_entropy(entropies)
    dots = _dots(axes)
    np.testing.assert_array_equal(dots.get_offsets(), entropies[["layer", "entropy"]])
    np.testing.assert_allclose(dots.get_array(), 1 - entropies["prefix_mass"])
    assert dots.get_clim() == (0, 1)
    assert axes.get_xlabel() == "Network depth (layer)"
    assert axes.get_ylabel() == "Attention entropy (nats)"
    assert axes.get_ylim()[0] == 0
    (bar,) = axes.child_axes
    assert bar.get_ylabel() == "Attention on patches"


def test_dots_are_coloured_as_those_of_distances_are(entropies: pd.DataFrame, frame: pd.DataFrame) -> None:
    from vit_probe.plots import plot_attention_distance

    masses = frame.assign(patch_mass=1 - entropies["prefix_mass"])
    one, other = plot_attention_entropy(entropies), plot_attention_distance(masses)
    for axes in (one, other):
        axes.figure.draw_without_rendering()
    np.testing.assert_allclose(_dots(one).get_facecolors(), _dots(other).get_facecolors())


def test_the_line_of_uniform_attention(entropies: pd.DataFrame) -> None:
    axes = plot_attention_entropy(entropies)
    (line,) = axes.get_lines()
    np.testing.assert_array_equal(line.get_ydata(), np.log(65))
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["uniform attention"]
    axes.figure.draw_without_rendering()
    assert axes.transData.transform((0, np.log(65)))[1] < legend.get_window_extent().y0


def test_windows_have_their_own_uniform_attention(entropies: pd.DataFrame) -> None:
    windows = entropies.assign(uniform_entropy=np.where(entropies["layer"] == 5, np.log(65), np.log(16)))
    (steps,) = [patch for patch in plot_attention_entropy(windows).patches if patch.get_label() == "uniform attention"]
    assert isinstance(steps, StepPatch)
    np.testing.assert_allclose(steps.get_data().values, np.log([16] * 5 + [65]))


def test_spread_adds_the_deviation_over_images(entropies: pd.DataFrame) -> None:
    assert not plot_attention_entropy(entropies).containers
    (bars,) = plot_attention_entropy(entropies, spread=True).containers
    assert isinstance(bars, ErrorbarContainer)
    assert bars.get_label() == "±1 std over 32 images"


@pytest.mark.parametrize(("inches", "label"), [(3.0, "Attention on patches"), (1.3, "On patches")])
def test_the_label_of_the_colour_bar_fits(entropies: pd.DataFrame, inches: float, label: str) -> None:
    axes = Figure(figsize=(4, inches)).subplots()
    (bar,) = plot_attention_entropy(entropies, ax=axes).child_axes
    assert bar.get_ylabel() == label


def test_heads_that_are_certain_start_at_zero(entropies: pd.DataFrame) -> None:
    assert plot_attention_entropy(entropies.assign(entropy=0.0, std=0.0, uniform_entropy=0.0)).get_ylim()[1] > 0


def test_errors_say_what_arrived(entropies: pd.DataFrame) -> None:
    with pytest.raises(
        InputError,
        match=r"heads by entropy lacks the columns entropy, std; pass .* of heads gives as to_dataframe\(\)",
    ):
        plot_attention_entropy(entropies.drop(columns=["std", "entropy"]))
    with pytest.raises(InputError, match="table of heads by entropy has no rows; measure at least one head"):
        plot_attention_entropy(entropies.iloc[:0])
    mixed = entropies.assign(uniform_entropy=np.where(entropies["head"] < 3, 4.0, 5.0))
    with pytest.raises(InputError, match=r"several grids \(uniform_entropy from 4 to 5\); draw one grid at a time"):
        plot_attention_entropy(mixed)


# Against distance


def test_one_dot_per_head_at_its_distance_and_entropy(joint: pd.DataFrame) -> None:
    axes = plot_entropy_and_distance(joint)
    dots = _dots(axes, 0)
    np.testing.assert_array_equal(dots.get_offsets(), joint[["distance", "entropy"]])
    np.testing.assert_array_equal(dots.get_array(), joint["layer"])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Mean attention distance (pixels)", "Attention entropy (nats)")
    assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0
    assert axes.get_xlim()[1] > 33.1
    (bar,) = axes.child_axes
    assert bar.get_ylabel() == "Layer"
    assert bar.get_yticks().tolist() == [0, 5]


def test_uniform_attention_is_marked(joint: pd.DataFrame) -> None:
    (cross,) = plot_entropy_and_distance(joint).get_lines()
    assert (cross.get_xdata().tolist(), cross.get_ydata().tolist()) == ([33.1], [np.log(65)])  # type: ignore[union-attr]
    windows = joint.assign(uniform_distance=np.where(joint["layer"] < 3, 10.0, 33.1))
    (crosses,) = plot_entropy_and_distance(windows).get_lines()
    assert crosses.get_xdata().tolist() == [10.0, 33.1]  # type: ignore[union-attr]


def test_a_model_of_one_layer(joint: pd.DataFrame) -> None:
    (bar,) = plot_entropy_and_distance(joint[joint["layer"] == 3]).child_axes
    assert bar.get_yticks().tolist() == [3]


def test_draws_on_the_axes_it_is_given(joint: pd.DataFrame) -> None:
    for plot in (plot_attention_entropy, plot_entropy_and_distance):
        axes = Figure().subplots()
        assert plot(joint, ax=axes) is axes  # type: ignore[operator]
        assert axes.collections


def test_errors_of_the_joint_table(entropies: pd.DataFrame, joint: pd.DataFrame) -> None:
    with pytest.raises(InputError, match="lacks the columns distance, uniform_distance; pass what head_table gives"):
        plot_entropy_and_distance(entropies)
    with pytest.raises(InputError, match="distances and entropies has no rows"):
        plot_entropy_and_distance(joint.iloc[:0])


# Both side by side


def test_both_side_by_side(joint: pd.DataFrame) -> None:
    table = joint.rename(columns={"std": "entropy_std"})
    figure = plot_entropy_sheet(table)
    left, right = figure.axes[:2]
    np.testing.assert_array_equal(_dots(left).get_offsets(), table[["layer", "entropy"]])
    np.testing.assert_array_equal(_dots(right, 0).get_offsets(), table[["distance", "entropy"]])
    assert figure.get_figwidth() == 6.75
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in (left, right)]
    assert_inside(figure, boxes)
    assert not boxes[0].overlaps(boxes[1])
    with pytest.raises(InputError, match="distance"):
        plot_entropy_sheet(table.drop(columns="distance"))
