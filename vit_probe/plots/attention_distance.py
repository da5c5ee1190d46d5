"""Mean attention distance: against depth, and with the heads of a layer sorted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from vit_probe.errors import InputError
from vit_probe.plots.layout import label_across, panel_row, title_inches
from vit_probe.plots.per_head import UNIFORM_LINE, HeadQuantity, dots_against_depth, uniform_by_layer, whole_numbers
from vit_probe.plots.style import WIDTHS, drawing_axes, figure_size, style

__all__ = [
    "plot_attention_distance",
    "plot_attention_distances",
    "plot_sorted_heads",
]


_DISTANCE = HeadQuantity(
    column="distance",
    plural="distances",
    mass="patch_mass",
    label="Mean attention distance (pixels)",
    measure="mean_attention_distance",
)
_MARKERS = "osD^vPX*"


def plot_attention_distance(frame: pd.DataFrame, *, ax: Axes | None = None, spread: bool = False) -> Axes:
    """Draw one dot a head, against depth, with the distance that uniform attention would have.

    The darker a dot, the more of its head's attention goes to patches at all; a pale dot is a head that looks
    mostly at the class token or another prefix token, so that its distance says little.

    Args:
        frame: One row a head; columns layer (from 0), head, distance (pixels), std (over images, pixels),
            patch_mass (in [0, 1]), uniform_distance (pixels), num_images. A distance of NaN is left out.
        ax: Where to draw; a new figure if None.
        spread: Whether to add error bars of one standard deviation over images, heads set side by side.

    Returns:
        The axes. The dots are `ax.collections[-1]`, in the order of the frame's rows.

    Raises:
        InputError: If columns are missing, there is no row, or rows come from several grids.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7 (right) and figure 11.
    """
    uniform = uniform_by_layer(frame, _DISTANCE)
    patch_mass = frame["patch_mass"].to_numpy(dtype=float)
    with drawing_axes(ax, figure_size("neurips", 0.45)) as axes:
        dots_against_depth(axes, frame, _DISTANCE, uniform, patch_mass, spread=spread)
    return axes


def plot_sorted_heads(frame: pd.DataFrame, *, layers: Sequence[int] | None = None, ax: Axes | None = None) -> Axes:
    """Draw the heads of some layers, sorted by distance, one line a layer.

    Args:
        frame: As for `plot_attention_distance`.
        layers: Which layers, counted from 0; if None, the first two and the last two.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes; its lines are the layers in the order asked for, then uniform attention.

    Raises:
        InputError: As for `plot_attention_distance`, and if a layer is not in the frame or none is asked for.

    References:
        Raghu et al. 2021, arXiv:2108.08810, figure 3.
    """
    uniform = uniform_by_layer(frame, _DISTANCE)
    known = sorted({int(layer) for layer in frame["layer"]})
    chosen = list(layers) if layers is not None else sorted({*known[:2], *known[-2:]})
    absent = [layer for layer in chosen if layer not in known]
    if absent or not chosen:
        raise InputError(f"layers {chosen} were asked for, but there are layers {known[0]} to {known[-1]}; name some of those")
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.88, len(chosen)))
    with drawing_axes(ax, figure_size("icml", 0.72)) as axes:
        highest, most = float(uniform[chosen].max()), 1
        for index, layer in enumerate(chosen):
            distances = np.sort(frame.loc[frame["layer"] == layer, "distance"].to_numpy(dtype=float))
            highest, most = float(np.nanmax([*distances, highest])), max(most, len(distances))
            marker = _MARKERS[index % len(_MARKERS)]
            axes.plot(distances, color=colours[index], marker=marker, markersize=3.5, label=f"layer {layer}")
        for index, value in enumerate(dict.fromkeys(uniform[chosen])):
            axes.axhline(value, label="_" if index else "uniform", **UNIFORM_LINE)
        axes.set_ylim(0, (highest or 1.0) * 1.05)
        whole_numbers(axes, -0.4, most - 0.6)
        axes.set_xlabel("Sorted attention heads")
        axes.set_ylabel("Mean attention distance (pixels)")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return axes


_MARGINS = (0.48, 0.42, 0.58)  # left, bottom and right of the row of panels, in inches
_HEIGHT = 1.9  # inches of a panel, as much as the label of its vertical axis needs
_TITLE_POINTS = 8


def plot_attention_distances(
    frames: Mapping[str, pd.DataFrame], *, figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """Draw one panel a table, as `plot_attention_distance` does, all with the same vertical axis.

    Args:
        frames: Tables of `plot_attention_distance` by title (which may have several lines), from left to right.
        figure: Where to draw, a figure or a part of one; a new one if None, of a column's width for two tables or fewer (5.5
            inches) and of a page's (6.75) for more.

    Returns:
        The figure; its first axes are the panels, from left to right. The first has the legend, the last the colour bar.

    Raises:
        InputError: If there is no table, or as `plot_attention_distance` does.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 11 (a ViT and a hybrid).
    """
    if not frames:
        raise InputError("there is no table of attention distances to draw; give at least one, by title")
    left, bottom, right = _MARGINS
    top = title_inches(frames)
    if figure is None:
        with style():
            size = WIDTHS["neurips" if len(frames) < 3 else "icml-page"], _HEIGHT + bottom + top
            return plot_attention_distances(frames, figure=Figure(figsize=size))
    panels = panel_row(figure, len(frames), (left, bottom, right, top))
    for panel, (title, frame) in zip(panels, frames.items(), strict=True):
        plot_attention_distance(frame, ax=panel)
        panel.set_title(title, fontsize=_TITLE_POINTS)
    highest = max(panel.get_ylim()[1] for panel in panels)
    for panel in panels:
        panel.set_ylim(0, highest)
    for panel in panels[1:]:
        panel.set_ylabel("")
        panel.tick_params(labelleft=False)
        if (legend := panel.get_legend()) is not None:
            legend.remove()
    for panel in panels[:-1]:
        for bar in tuple(panel.child_axes):
            bar.remove()
    label_across(panels, panels[0].get_xlabel())
    return figure
