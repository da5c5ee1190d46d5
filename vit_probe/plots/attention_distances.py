"""Mean attention distance of several models, or of one at several times, side by side."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure, SubFigure

from vit_probe.errors import InputError
from vit_probe.plots.attention_distance import plot_attention_distance
from vit_probe.plots.panels import label_across, panel_row, title_inches
from vit_probe.plots.style import WIDTHS, style

__all__ = ["plot_attention_distances"]

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
