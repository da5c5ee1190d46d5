"""Attention entropy: against depth, and against attention distance."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_probe.plots.layout import check_columns, check_rows
from vit_probe.plots.per_head import plot_heads, slim_bar
from vit_probe.plots.style import drawing_axes, figure_size, style

__all__ = ["plot_attention_entropy", "plot_entropy_and_distance", "plot_entropy_sheet"]

_JOINT = ("layer", "head", "distance", "uniform_distance", "entropy", "uniform_entropy")
_BAND = 1.08  # where the axes end, relative to the largest value


def plot_attention_entropy(frame: pd.DataFrame, *, ax: Axes | None = None, spread: bool = False) -> Axes:
    """Draw one dot per head, against depth, with the entropy of uniform attention; see `plot_heads`.

    Args:
        frame: One row per head; columns layer (from 0), head, entropy (nats), std (over images, nats), prefix_mass (in [0, 1]),
            uniform_entropy (nats), num_images. An entropy of NaN is left out.
        ax: Where to draw; a new figure if None.
        spread: Whether to add error bars of one standard deviation over images, heads set side by side.

    Returns:
        The axes. The dots are `ax.collections[-1]`, in the order of the frame's rows.

    Raises:
        InputError: If columns are missing, there is no row, or rows come from several grids.

    References:
        Clark et al. 2019, arXiv:1906.04341, figure 4, for a language model.

    Examples:
        >>> table = pd.DataFrame({"layer": [0, 1], "head": 0, "entropy": [1.0, 2.0], "std": 0.1, "num_images": 8})
        >>> plot_attention_entropy(table).get_ylabel()
        'Attention entropy (nats)'
    """
    return plot_heads(frame, column="entropy", label="Attention entropy (nats)", ax=ax, spread=spread)


def plot_entropy_and_distance(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw one dot per head: over how many tokens it spreads its attention, against how far away they are.

    Args:
        frame: One row per head; columns layer (from 0), head, distance and uniform_distance (pixels), entropy and
            uniform_entropy (nats), as `head_table` gives them.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes. The dots are `ax.collections[0]`, in the order of the frame's rows, coloured by layer; crosses mark uniform
        attention.

    Raises:
        InputError: If columns are missing, or there is no row.
    """
    what = "the table of distances and entropies"
    check_columns(frame, _JOINT, what, "pass what head_table gives")
    check_rows(frame, what, "measure at least one head")
    uniform = frame[["uniform_distance", "uniform_entropy"]].drop_duplicates().to_numpy(dtype=float)
    layer, distance, entropy = (frame[name].to_numpy(dtype=float) for name in ("layer", "distance", "entropy"))
    first, last = int(layer.min()), int(layer.max())
    with drawing_axes(ax, figure_size("icml", 0.72)) as axes:
        dots = axes.scatter(
            distance,
            entropy,
            c=layer,
            cmap=mpl.colormaps["viridis"],
            vmin=first,
            vmax=max(last, first + 1),
            s=14,
            edgecolors="#1A1A1A",
            linewidths=0.4,
            zorder=3,
        )
        axes.plot(*uniform.T, color="#D55E00", marker="X", markersize=6, linestyle="none", label="uniform attention", zorder=2)
        for limit, values, far in ((axes.set_xlim, distance, uniform[:, 0]), (axes.set_ylim, entropy, uniform[:, 1])):
            limit(0, (float(np.nanmax([*values, *far])) or 1.0) * _BAND)
        axes.set_xlabel("Mean attention distance (pixels)")
        axes.set_ylabel("Attention entropy (nats)")
        axes.legend(loc="upper left", frameon=False, borderpad=0.2)  # few tokens are near a query, so no dot lies there
        slim_bar(axes, dots, "Layer", [first, last] if last > first else [first])
    return axes


def plot_entropy_sheet(frame: pd.DataFrame) -> Figure:
    """Draw the heads' entropies twice, side by side: against depth, and against attention distance.

    Args:
        frame: One row per head, as `head_table` gives them.

    Returns:
        A figure of a page's width (6.75 inches); its first two axes are those of `plot_attention_entropy` and
        `plot_entropy_and_distance`.

    Raises:
        InputError: As these two do.
    """
    with style():
        figure = Figure(figsize=figure_size("icml-page", 0.36))
        figure.set_layout_engine("constrained", w_pad=0.06)
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        plot_attention_entropy(frame.rename(columns={"entropy_std": "std"}), ax=left)
        plot_entropy_and_distance(frame, ax=right)
    return figure
