from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from tests.plots.overlap_checks import assert_inside
from vit_probe.errors import InputError
from vit_probe.plots.deletion import plot_deletion


def _frame(images: int = 4) -> pd.DataFrame:
    """Two orders, which are not in alphabetical order, of five steps."""
    order, image, step = (index.ravel() for index in np.indices((2, images, 5)))
    probability = np.random.default_rng(0).random(len(order))
    names = np.array(["rollout", "random"], dtype=object)
    return pd.DataFrame({"order": names[order], "image": image, "fraction": step / 4, "probability": probability})


def test_one_line_per_order() -> None:
    frame = _frame()
    axes = plot_deletion(frame)
    assert [line.get_label() for line in axes.lines] == ["rollout", "random"]
    for line, name in zip(axes.lines, ("rollout", "random"), strict=True):
        values = frame[frame.order == name].probability.to_numpy().reshape(4, 5)
        np.testing.assert_allclose(line.get_xdata(), [0, 0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(line.get_ydata(), values.mean(axis=0))
    assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()  # distinguishable without colours
    assert axes.get_xlabel() == "Patches deleted"
    assert axes.get_ylabel() == "Probability of the predicted class"
    assert axes.get_ylim()[0] == 0


def test_every_text_is_inside_the_figure() -> None:
    axes = plot_deletion(_frame())
    axes.figure.draw_without_rendering()
    ticks = [tick.label1 for axis in (axes.xaxis, axes.yaxis) for tick in axis._update_ticks()]  # those that are drawn
    legend = axes.get_legend()
    assert legend is not None
    texts = (*ticks, axes.xaxis.label, axes.yaxis.label, *legend.get_texts(), legend.get_title())
    assert_inside(axes.figure, (text.get_window_extent() for text in texts))


def test_draws_on_the_given_axes() -> None:
    axes = Figure().subplots()
    assert plot_deletion(_frame(), ax=axes) is axes


@pytest.mark.parametrize("frame", [_frame().iloc[:0], _frame().drop(columns="fraction")])
def test_errors_say_what_arrived(frame: pd.DataFrame) -> None:
    with pytest.raises(
        InputError,
        match=r"has \d+ rows and columns \[.*\]; it must have rows and columns order, image, fraction, probability",
    ):
        plot_deletion(frame)
