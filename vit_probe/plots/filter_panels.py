"""Several sets of first-layer filters side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from numpy.typing import NDArray

from vit_probe.errors import InputError
from vit_probe.plots.patch_filters import plot_patch_filters
from vit_probe.plots.style import WIDTHS, fitting_text, style

__all__ = ["plot_filter_panels"]

_GAP = 0.06  # of a panel's width, between two
_ROOM = 0.94  # of its share of the figure's width, that a panel fills
_TITLE_POINTS = 8
_TITLE_INCHES, _LINE_INCHES = 0.13, 0.13  # above a mosaic, and for each line of its title
_TALLEST = 8.5  # inches; what a page leaves for a figure


def plot_filter_panels(panels: Mapping[str, NDArray[Any]], *, figure: Figure | None = None) -> Figure:
    """Draw one mosaic of filters a set, as `plot_patch_filters` does.

    Args:
        panels: (filter, channel, row, col) by title (which may have several lines; a line too long is shortened), from left to
            right.
        figure: Where to draw; a new one of a column's width (5.5 inches) if None.

    Returns:
        The figure; its axes are the panels, from left to right.

    Raises:
        InputError: If there is no set, or as `plot_patch_filters` does.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7 (left).
    """
    if not panels:
        raise InputError("there are no filters to draw; give at least one set, by title")
    if figure is None:
        with style():
            figure = Figure(figsize=(WIDTHS["neurips"], WIDTHS["neurips"] / len(panels)))
            figure.set_layout_engine("constrained", wspace=_GAP)
            plot_filter_panels(panels, figure=figure)
        pictures = [axes.images[0].get_size() for axes in figure.axes]
        lines = max(len(title.splitlines()) for title in panels)
        highest = max(rows / cols for rows, cols in pictures) * _ROOM * figure.get_figwidth() / len(panels)
        figure.set_figheight(min(highest + _TITLE_INCHES + lines * _LINE_INCHES, _TALLEST))
        return figure
    room = _ROOM * figure.get_figwidth() / len(panels)
    for axes, (title, filters) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        plot_patch_filters(filters, ax=axes)
        axes.set_anchor("N")
        shown = [fitting_text(line, room, _TITLE_POINTS) for line in title.splitlines()]
        axes.set_title("\n".join(shown), fontsize=_TITLE_POINTS, parse_math=False)
    return figure
