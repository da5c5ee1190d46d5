"""Receptive fields of convolutional networks against depth, alone and beside the distances of attention."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from vit_probe.plots.attention_distance import plot_attention_distance
from vit_probe.plots.style import OKABE_ITO, drawing_axes, figure_size, style
from vit_probe.plots.tables import check_columns, check_rows

__all__ = ["plot_attention_beside_convolutions", "plot_receptive_field"]

_COLUMNS = ("network", "layer", "depth", "receptive_field", "reach", "mean_distance")
_COLOURS = tuple(OKABE_ITO[index] for index in (7, 1, 2, 5, 0, 4, 3, 6))  # black first, and far from the colours of heads
_GREY = "#666666"
_ASPECT = 0.5
_TITLE_POINTS = 8
_MEAN: Any = {"linestyle": (0, (1, 1.5)), "linewidth": 1.2}
_NARROW: Any = {"columnspacing": 1.2, "handlelength": 1.6}  # of the legend, in widths of its text's size
_ABOVE = 1.05  # the axis ends so much above the highest mark


def plot_receptive_field(frame: pd.DataFrame, *, highest: float | None = None, ax: Axes | None = None) -> Axes:
    """Draw half of the receptive field of each layer against depth, a line a network, from a pixel's 0 on.

    Half a receptive field is how far a unit sees to each side of its centre. A dotted line of the same colour is the mean
    distance of what the unit sees if all kernels are even, the quantity to compare with a head's mean attention distance. A
    pooling widens the field without adding to the depth, so that a line rises there. The legend gives the width of the whole
    field of the last layer.

    Args:
        frame: One row a layer of a network; columns network, layer, depth (convolutions), receptive_field, reach and
            mean_distance (pixels). Networks are drawn in the order in which they come.
        highest: Where the vertical axis ends, in pixels; lines may leave it. If None, above the farthest reach.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes. Each network has two lines, its reach and its mean distance.

    Raises:
        InputError: If columns are missing or there is no row.

    References:
        Araujo, Norris & Sim 2019, Distill, doi:10.23915/distill.00021; Luo et al. 2016, arXiv:1701.04128.
    """
    _check(frame)
    with drawing_axes(ax, figure_size("neurips", _ASPECT)) as axes:
        handles = _draw(axes, frame)
        axes.set_ylim(0, highest or _ABOVE * float(frame["reach"].max()) or 1.0)
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return axes


def plot_attention_beside_convolutions(heads: pd.DataFrame, fields: pd.DataFrame, *, figure: Figure | None = None) -> Figure:
    """Draw mean attention distance (left) and receptive fields (right) on one axis of pixels.

    A line across the left panel is half the receptive field of the first network's last layer. Networks that see farther than
    any head's mean distance leave the right panel at its top.

    Args:
        heads: One row a head, as for `plot_attention_distance`.
        fields: One row a layer, as for `plot_receptive_field`.
        figure: Where to draw; a new one of a column's width (5.5 inches) if None.

    Returns:
        The figure; its first two axes are the panels.

    Raises:
        InputError: As the functions of the panels do.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5 and figures 7 (right) and 11, which call attention distance
        analogous to the size of receptive fields in convolutional networks.
    """
    _check(fields)
    if figure is None:
        with style():
            figure = Figure(figsize=figure_size("neurips", _ASPECT), layout="constrained")
            return plot_attention_beside_convolutions(heads, fields, figure=figure)
    left, right = figure.subplots(1, 2, sharey=True)
    first = fields[fields["network"] == fields["network"].iloc[0]].sort_values("layer").iloc[-1]
    left.axhline(first["reach"], color=_COLOURS[0], linewidth=0.8, zorder=1, label=str(first["network"]))
    plot_attention_distance(heads, ax=left)
    handles = _draw(right, fields)  # the heads have set the limits of the common axis
    right.tick_params(labelleft=True)
    left.set_title("Attention heads", fontsize=_TITLE_POINTS)
    right.set_title("Units of convolutional networks", fontsize=_TITLE_POINTS)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, **_NARROW)
    return figure


def _draw(axes: Axes, frame: pd.DataFrame) -> list[Line2D]:
    """Draws the lines and the horizontal axis; returns what a legend should show."""
    handles: list[Line2D] = []
    for index, (network, rows) in enumerate(frame.groupby("network", sort=False)):
        rows = rows.sort_values("layer")
        depth, colour = [0, *rows["depth"]], _COLOURS[index % len(_COLOURS)]
        label = f"{network}: {rows['receptive_field'].iloc[-1]} px wide"
        end: Any = {"marker": "o", "markersize": 3, "markevery": [len(rows)]}
        handles += axes.plot(depth, [0, *rows["reach"]], color=colour, label=label, zorder=3, **end)
        axes.plot(depth, [0, *rows["mean_distance"]], color=colour, label="_", zorder=2, **_MEAN)
    axes.set_xlim(0, 1.03 * max(1.0, float(frame["depth"].max())))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Depth (convolutions)")
    axes.set_ylabel("Distance from the centre (pixels)")
    half = Line2D([], [], color=_GREY, label="half of the field")
    return [*handles, half, Line2D([], [], color=_GREY, label="mean, even kernels", **_MEAN)]


def _check(frame: pd.DataFrame) -> None:
    what = "the table of receptive fields"
    remedy = "pass what the result of receptive_field gives as to_dataframe(), of several networks one below the other"
    check_columns(frame, _COLUMNS, what, remedy)
    check_rows(frame, what, "give at least one layer")
