"""Values of each layer: against depth, or one line per layer against a further axis."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from vit_probe.plots.layout import check_columns, check_rows
from vit_probe.plots.per_head import slim_bar, whole_numbers
from vit_probe.plots.style import OKABE_ITO, drawing_axes, figure_size

__all__ = ["plot_layers"]


def plot_layers(
    frame: pd.DataFrame,
    *,
    column: str,
    label: str,
    axis: str | None = None,
    axis_label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a value of every layer against depth, with its 95 % confidence interval as a band; or one line per layer.

    Args:
        frame: One row per layer, or per layer and entry of the axis; columns layer (from 0), `column`, confidence, and the axis
            if there is one.
        column: What is drawn.
        label: Of the vertical axis, with the unit.
        axis: Column of the horizontal axis, such as the frequency; if None, the layer.
        axis_label: Of the horizontal axis; the column's name if None.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes; its lines are the layers in order, or a single line.

    Raises:
        InputError: If columns are missing, or there is no row.

    Examples:
        >>> table = pd.DataFrame({"layer": [0, 1], "cosine": [0.2, 0.4], "confidence": 0.01})
        >>> plot_layers(table, column="cosine", label="Cosine similarity").lines[0].get_ydata().tolist()
        [0.2, 0.4]
    """
    what = f"the table of layers by {column}"
    columns = ("layer", column, "confidence", *([] if axis is None else [axis]))
    check_columns(frame, columns, what, "pass what the result of a measure of layers gives as to_dataframe()")
    check_rows(frame, what, "measure at least one layer")
    layers = sorted({int(layer) for layer in frame["layer"]})
    with drawing_axes(ax, figure_size("icml", 0.72)) as axes:
        if axis is None:
            value, half = (frame[name].to_numpy(dtype=float) for name in (column, "confidence"))
            half = np.nan_to_num(half)  # one image has no interval
            axes.fill_between(frame["layer"], value - half, value + half, color=OKABE_ITO[4], alpha=0.5, linewidth=0)
            axes.plot(frame["layer"], value, color=OKABE_ITO[0], marker=".", markersize=5)
            whole_numbers(axes, layers[0] - 0.4, layers[-1] + 0.4)
            axes.set_xlabel("Network depth (layer)")
        else:
            colours = mpl.colormaps["viridis"]
            norm = mpl.colors.Normalize(layers[0], max(layers[-1], layers[0] + 1))
            for layer in layers:
                rows = frame[frame["layer"] == layer]
                axes.plot(rows[axis], rows[column], color=colours(norm(layer)), linewidth=1.0)
            axes.set_xlabel(axis_label or axis.replace("_", " ").capitalize())
            marks = mpl.cm.ScalarMappable(norm, colours)
            slim_bar(axes, marks, "Layer", [layers[0], layers[-1]] if len(layers) > 1 else layers)
        axes.set_ylabel(label)
    return axes
