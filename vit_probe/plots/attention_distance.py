"""Mean attention distance of one model, or of several side by side."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from vit_probe.errors import InputError
from vit_probe.plots.layout import label_across, panel_row, title_inches
from vit_probe.plots.per_head import plot_heads
from vit_probe.plots.style import WIDTHS, style

__all__ = [
    "plot_attention_distance",
    "plot_attention_distances",
]


def plot_attention_distance(frame: pd.DataFrame, *, ax: Axes | None = None, spread: bool = False) -> Axes:
    """Draw one dot per head, against depth, with the distance of uniform attention; see `plot_heads`.

    Args:
        frame: One row per head; columns layer (from 0), head, distance (pixels), std (over images, pixels),
            patch_mass (in [0, 1]), uniform_distance (pixels), num_images. A distance of NaN is left out.
        ax: Where to draw; a new figure if None.
        spread: Whether to add error bars of one standard deviation over images, heads set side by side.

    Returns:
        The axes. The dots are `ax.collections[-1]`, in the order of the frame's rows.

    Raises:
        InputError: If columns are missing, there is no row, or rows come from several grids.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7 (right) and figure 11.

    Examples:
        >>> table = pd.DataFrame({"layer": [0, 1], "head": 0, "distance": [9.0, 20.0], "std": 1.0, "num_images": 8})
        >>> plot_attention_distance(table).get_ylabel()
        'Mean attention distance (pixels)'
    """
    return plot_heads(frame, column="distance", label="Mean attention distance (pixels)", ax=ax, spread=spread)


_MARGINS = (0.48, 0.42, 0.58)  # left, bottom and right of the row of panels, in inches
_HEIGHT = 1.9  # inches of a panel; the label of its vertical axis needs them
_TITLE_POINTS = 8


def plot_attention_distances(
    frames: Mapping[str, pd.DataFrame], *, figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """Draw one panel per table, as `plot_attention_distance` does, all with the same vertical axis.

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
