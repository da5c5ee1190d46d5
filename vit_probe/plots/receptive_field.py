"""Receptive fields of convolutional networks against depth, alone and beside the distances of attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from vit_probe.plots.attention_distance import plot_attention_distance
from vit_probe.plots.layout import check_columns, check_rows
from vit_probe.plots.style import OKABE_ITO, drawing_axes, figure_size, style

__all__ = ["plot_attention_beside_convolutions", "plot_receptive_field"]

_COLUMNS = ("network", "layer", "depth", "receptive_field", "reach", "mean_distance")
_COLOURS = tuple(OKABE_ITO[index] for index in (7, 1, 2, 5, 0, 4, 3, 6))  # black first, and far from the colours of heads
_MARKERS = "osDvPXph"  # no triangle that points upwards: such are the arrows of lines that leave the axes
_GREY = "#666666"
_ASPECT, _PAIR_ASPECT = 0.5, 0.54
_TITLE_POINTS = 8
_MEAN: Any = {"linestyle": (0, (1, 1.5)), "linewidth": 1.2}
_MARKED: Any = {"markersize": 3.5, "markerfacecolor": "white", "markeredgewidth": 0.8, "markevery": 0.15}
_ARROW: Any = {"marker": "^", "s": 14, "linewidths": 0, "clip_on": False, "zorder": 4}
_NARROW: Any = {"frameon": False, "columnspacing": 1.2, "handlelength": 1.6}  # of legends, in widths of their text's size
_ABOVE = 1.05  # the axis ends so much above the highest mark


def plot_receptive_field(frame: pd.DataFrame, *, highest: float | None = None, ax: Axes | None = None) -> Axes:
    """Draw half of the receptive field of each layer against depth, a line a network, from a pixel's 0 on.

    Half a receptive field is how far a unit sees to each side of its centre. A dotted line of the same colour and markers is
    the mean distance of what the unit sees if all kernels are even, the quantity to compare with a head's mean attention
    distance. A pooling widens the field without adding to the depth, so that a line rises there. Markers tell networks apart:
    one stands where a line ends, others along it, though not at every layer. The legend gives the width of the whole field of
    the last layer.

    Args:
        frame: One row a layer of a network; columns network, layer, depth (convolutions), receptive_field, reach and
            mean_distance (pixels). Networks are drawn in the order in which they come.
        highest: Where the vertical axis ends, in pixels; a line that leaves it does so with an arrow. If None, above the
            farthest reach.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes. Each network has two lines, its reach and its mean distance; arrows are in `ax.collections`.

    Raises:
        InputError: If columns are missing or there is no row.

    References:
        Araujo, Norris & Sim 2019, Distill, doi:10.23915/distill.00021; Luo et al. 2016, arXiv:1701.04128.
    """
    _check(frame)
    with drawing_axes(ax, figure_size("neurips", _ASPECT)) as axes:
        axes.set_ylim(0, highest or _ABOVE * float(frame["reach"].max()) or 1.0)
        handles = _draw(axes, frame)
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return axes


def plot_attention_beside_convolutions(heads: pd.DataFrame, fields: pd.DataFrame, *, figure: Figure | None = None) -> Figure:
    """Draw mean attention distance (left) and receptive fields (right) on one axis of pixels.

    The solid line across the left panel is half the receptive field of the first network's last layer, and the dotted one the
    mean distance of what that layer sees if all kernels are even. The heads decide where the axis ends: lines of networks that
    see farther leave the right panel at its top, with an arrow.

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
            figure = Figure(figsize=figure_size("neurips", _PAIR_ASPECT), layout="constrained")
            return plot_attention_beside_convolutions(heads, fields, figure=figure)
    left, right = figure.subplots(1, 2, sharey=True)
    across = _draw_across(left, fields[fields["network"] == fields["network"].iloc[0]].sort_values("layer").iloc[-1])
    plot_attention_distance(heads, ax=left)
    handles = _draw(right, fields)  # the heads have set the limits of the common axis
    right.tick_params(labelleft=True)
    left.set_title("Attention heads", fontsize=_TITLE_POINTS)
    right.set_title("Units of convolutional networks", fontsize=_TITLE_POINTS)
    labels = [str(line.get_label()).removeprefix("_") for line in across]
    figure.legend(across, labels, loc="outside lower left", **_NARROW)
    figure.legend(handles=handles, loc="outside lower right", ncols=2, **_NARROW)
    return figure


def _draw_across(axes: Axes, layer: pd.Series[Any]) -> list[Line2D]:
    """Draws what a layer sees as lines across the axes, which its legend leaves out."""
    return [
        axes.axhline(layer["reach"], color=_COLOURS[0], zorder=1, label=f"_half the field of\n{layer['network']}"),
        axes.axhline(layer["mean_distance"], color=_COLOURS[0], zorder=1, label="_its mean, even kernels", **_MEAN),
    ]


def _draw(axes: Axes, frame: pd.DataFrame) -> list[Line2D]:
    """Draws the lines, on the vertical axis as it is, and the horizontal axis; returns what a legend should show."""
    handles: list[Line2D] = []
    top = axes.get_ylim()[1]
    for index, (network, rows) in enumerate(frame.groupby("network", sort=False)):
        rows = rows.sort_values("layer")
        depth, colour = np.array([0.0, *rows["depth"]]), _COLOURS[index % len(_COLOURS)]
        label = f"{network}: {rows['receptive_field'].iloc[-1]} px wide"
        look: Any = {"color": colour, "marker": _MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)], **_MARKED}
        for column, more in (("reach", {"label": label, "zorder": 3}), ("mean_distance", {"label": "_", "zorder": 2, **_MEAN})):
            distance = np.array([0.0, *rows[column]])
            handles += axes.plot(depth[::-1], distance[::-1], **look, **more)  # markers are spread from the first point on
            if distance.max() > top:
                above = int((distance > top).argmax())
                crossing = np.interp(top, distance[above - 1 : above + 1], depth[above - 1 : above + 1])
                axes.scatter(crossing, top, color=colour, **_ARROW)
    axes.set_xlim(0, 1.03 * max(1.0, float(frame["depth"].max())))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Depth (convolutions)")
    axes.set_ylabel("Distance from the centre (pixels)")
    half = Line2D([], [], color=_GREY, label="half of the field")
    return [*handles[::2], half, Line2D([], [], color=_GREY, label="mean, even kernels", **_MEAN)]


def _check(frame: pd.DataFrame) -> None:
    what = "the table of receptive fields"
    remedy = "pass what the result of receptive_field gives as to_dataframe(), of several networks one below the other"
    check_columns(frame, _COLUMNS, what, remedy)
    check_rows(frame, what, "give at least one layer")
