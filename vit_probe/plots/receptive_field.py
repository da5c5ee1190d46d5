"""Receptive fields of convolutional networks against depth, alone and beside attention distances."""

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
# Black first, as it differs most from the colours of heads.
_COLOURS = tuple(OKABE_ITO[index] for index in (7, 1, 2, 5, 0, 4, 3, 6))
_MARKERS = "osDvPXph"  # no upward triangle, which marks lines that leave the axes
_GREY = "#666666"
_ASPECT, _PAIR_ASPECT = 0.5, 0.54
_TITLE_POINTS = 8
_MEAN_STYLE: Any = {"linestyle": (0, (1, 1.5)), "linewidth": 1.2}
_MARKER_STYLE: Any = {"markersize": 3.5, "markerfacecolor": "white", "markeredgewidth": 0.8, "markevery": 0.15}
_ARROW_STYLE: Any = {"marker": "^", "s": 14, "linewidths": 0, "clip_on": False, "zorder": 4}
_NARROW_LEGEND: Any = {"frameon": False, "columnspacing": 1.2, "handlelength": 1.6}
_HEADROOM = 1.05  # upper limit of the vertical axis, relative to the highest point


def plot_receptive_field(frame: pd.DataFrame, *, highest: float | None = None, ax: Axes | None = None) -> Axes:
    """Draw half the receptive field of each layer against depth, one line per network.

    Half the receptive field is how far a unit sees to each side of its centre; lines start at a single pixel, whose half is 0.
    A dotted line of the same colour shows the mean distance of the pixels in the field if all kernels are uniform, which is the
    quantity to compare with the mean attention distance of a head. Pooling widens the field without adding depth, so that a
    line rises vertically there. Markers distinguish networks: they stand at the end of a line and at regular intervals along
    it, not at every layer. The legend states the full width of the last layer's receptive field.

    Args:
        frame: One row per network and layer; columns network, layer, depth (convolutions), receptive_field, reach and
            mean_distance (pixels). Networks are drawn in the order of first appearance.
        highest: Upper limit of the vertical axis, in pixels; arrows mark lines that exceed it. If None, the limit is above the
            largest reach.
        ax: Axes to draw on; if None, a new figure.

    Returns:
        The axes. Each network has two lines, its reach and its mean distance; arrows are in `ax.collections`.

    Raises:
        InputError: If columns are missing or the table has no rows.

    Examples:
        >>> import pandas as pd
        >>> fields = pd.DataFrame({"network": "CNN", "layer": [0, 1], "depth": [1, 2], "receptive_field": [3, 5]})
        >>> ax = plot_receptive_field(fields.assign(reach=[1.0, 2.0], mean_distance=[0.9, 1.4]))
        >>> ax.lines[0].get_label()
        'CNN: 5 px wide'

    References:
        Araujo, Norris & Sim 2019, Distill, doi:10.23915/distill.00021; Luo et al. 2016, arXiv:1701.04128.
    """
    _check(frame)
    with drawing_axes(ax, figure_size("neurips", _ASPECT)) as axes:
        axes.set_ylim(0, highest or _HEADROOM * float(frame["reach"].max()) or 1.0)
        handles = _draw(axes, frame)
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return axes


def plot_attention_beside_convolutions(heads: pd.DataFrame, fields: pd.DataFrame, *, figure: Figure | None = None) -> Figure:
    """Draw mean attention distance (left) and receptive fields (right) on a shared vertical axis, in pixels.

    In the left panel, the horizontal solid line is half the receptive field of the first network's last layer, and the dotted
    line the mean distance of the pixels that this layer sees if its kernels are uniform. The heads set the upper limit of the
    axis: lines of networks that see farther leave the right panel at the top, marked by an arrow.

    Args:
        heads: One row per head, as for `plot_attention_distance`.
        fields: One row per network and layer, as for `plot_receptive_field`.
        figure: Figure to draw on; if None, a new one of a column's width (5.5 inches).

    Returns:
        The figure; its first two axes are the panels.

    Raises:
        InputError: If the function of a panel raises it.

    Examples:
        >>> import pandas as pd
        >>> heads = pd.DataFrame({"layer": [0, 0], "head": [0, 1], "distance": [15.0, 40.0], "std": 2.0, "patch_mass": 0.9})
        >>> heads = heads.assign(uniform_distance=41.7, num_images=8)
        >>> fields = pd.DataFrame({"network": "CNN", "layer": [0, 1], "depth": [1, 2], "receptive_field": [3, 5]})
        >>> fields = fields.assign(reach=[1.0, 2.0], mean_distance=[0.9, 1.4])
        >>> figure = plot_attention_beside_convolutions(heads, fields)
        >>> [ax.get_title() for ax in figure.axes[:2]]
        ['Attention heads', 'Units of convolutional networks']

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
    last_layer = fields[fields["network"] == fields["network"].iloc[0]].sort_values("layer").iloc[-1]
    references = _draw_reference_lines(left, last_layer)
    plot_attention_distance(heads, ax=left)
    handles = _draw(right, fields)  # after the heads, which set the limits of the shared axis
    right.tick_params(labelleft=True)
    left.set_title("Attention heads", fontsize=_TITLE_POINTS)
    right.set_title("Units of convolutional networks", fontsize=_TITLE_POINTS)
    labels = [str(line.get_label()).removeprefix("_") for line in references]
    figure.legend(references, labels, loc="outside lower left", **_NARROW_LEGEND)
    figure.legend(handles=handles, loc="outside lower right", ncols=2, **_NARROW_LEGEND)
    return figure


def _draw_reference_lines(axes: Axes, layer: pd.Series[Any]) -> list[Line2D]:
    """Draw the reach and the mean distance of a layer as horizontal lines."""
    # An underscore keeps the labels out of the legend of the axes, since the figure has a separate legend for these lines.
    return [
        axes.axhline(layer["reach"], color=_COLOURS[0], zorder=1, label=f"_half the field of\n{layer['network']}"),
        axes.axhline(layer["mean_distance"], color=_COLOURS[0], zorder=1, label="_its mean, uniform kernels", **_MEAN_STYLE),
    ]


def _draw(axes: Axes, frame: pd.DataFrame) -> list[Line2D]:
    """Draw the lines without changing the limits of the vertical axis, and return the handles of a legend."""
    handles: list[Line2D] = []
    top = axes.get_ylim()[1]
    for index, (network, rows) in enumerate(frame.groupby("network", sort=False)):
        rows = rows.sort_values("layer")
        depth, colour = np.array([0.0, *rows["depth"]]), _COLOURS[index % len(_COLOURS)]
        label = f"{network}: {rows['receptive_field'].iloc[-1]} px wide"
        # Colours repeat after 8 networks; shifting the markers then keeps every combination distinct.
        common: Any = {"color": colour, "marker": _MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)], **_MARKER_STYLE}
        reach_style: Any = {"label": label, "zorder": 3}
        mean_style: Any = {"label": "_", "zorder": 2, **_MEAN_STYLE}
        for column, line_style in (("reach", reach_style), ("mean_distance", mean_style)):
            distance = np.array([0.0, *rows[column]])
            # Reversed, because matplotlib spaces markers from the first point on, and the last layer should have one.
            handles += axes.plot(depth[::-1], distance[::-1], **common, **line_style)
            if distance.max() > top:
                above = int((distance > top).argmax())
                crossing = np.interp(top, distance[above - 1 : above + 1], depth[above - 1 : above + 1])
                axes.scatter(crossing, top, color=colour, **_ARROW_STYLE)
    axes.set_xlim(0, 1.03 * max(1.0, float(frame["depth"].max())))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Depth (convolutions)")
    axes.set_ylabel("Distance from the centre (pixels)")
    half = Line2D([], [], color=_GREY, label="half the field")
    return [*handles[::2], half, Line2D([], [], color=_GREY, label="mean, uniform kernels", **_MEAN_STYLE)]


def _check(frame: pd.DataFrame) -> None:
    display_name = "the table of receptive fields"
    remedy = "pass to_dataframe() of a result of receptive_field, or several of them concatenated"
    check_columns(frame, _COLUMNS, display_name, remedy)
    check_rows(frame, display_name, "pass at least one layer")
