"""The pictures of several models side by side: one row a model, one column a measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from vit_probe.errors import InputError
from vit_probe.plots.layout import bare, check_columns, check_rows
from vit_probe.plots.style import OKABE_ITO, WIDTHS, drawing_axes, figure_size, style, text_inches

__all__ = ["Panel", "plot_comparison", "plot_range"]

Panel = Callable[..., Axes]
"""Draws on the axes that it is given as `ax`."""

_PANEL_INCHES = 1.17  # height of a row of panels
_TITLE_INCHES = 0.62  # of a block of rows, with the label of the horizontal axis
_TITLE_POINTS = 8
_BAR_INCHES = 0.85  # of a colour bar beside a panel; a longer label is left out


def plot_comparison(rows: Mapping[str, Mapping[str, Panel]], *, columns: int = 5) -> Figure:
    """Draw the same measures of several models, so that each column shows one measure on one scale.

    Graphs of a column have the same vertical axis, and pictures the same colours; pictures go without ticks and without what is
    written in or above them, and colour bars without labels that are longer than they. Maps of layer against layer, which begin
    at the lower left, keep the numbers of the first and the last layer. What only some rows have is left out.

    Args:
        rows: By the name of a model, its panels by title (which may have several lines, and names the unit of the vertical
            axis or of the colours, whose own label is left out).
        columns: Measures side by side; if there are more, the rest follows below, for all models again.

    Returns:
        A figure of a page's width (6.75 inches). Its axes are, row by row, the name of the row and then its panels.

    Raises:
        InputError: If there is no row or no measure that all rows have, or `columns` is below 1.
    """
    titles = [title for title in next(iter(rows.values()), {}) if all(title in panels for panels in rows.values())]
    if not titles:
        raise InputError(f"there is nothing that all of the {len(rows)} rows to be compared have; give each the same panels")
    if columns < 1:
        raise InputError(f"cannot draw measures in {columns} columns; give 1 or more")
    columns = min(columns, len(titles))
    blocks = math.ceil(len(titles) / columns)
    height = blocks * (len(rows) * _PANEL_INCHES + _TITLE_INCHES)
    with style():
        figure = Figure(figsize=(WIDTHS["icml-page"], height))
        figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.03)
        shape = (blocks * len(rows), columns + 1)
        grid = figure.subplots(*shape, squeeze=False, width_ratios=(0.01, *[1.0] * columns))
        for line, axes in enumerate(grid):
            _name(axes[0], list(rows)[line % len(rows)])
        for index in range(blocks * columns):
            block, column = divmod(index, columns)
            places = grid[block * len(rows) : (block + 1) * len(rows), column + 1].tolist()
            if index < len(titles):
                _draw_column(places, titles[index], [panels[titles[index]] for panels in rows.values()])
            else:
                for axes in places:
                    axes.set_axis_off()
    return figure


def _name(axes: Axes, name: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, name, rotation=90, ha="center", va="center", fontsize=9, transform=axes.transAxes)


def _draw_column(places: list[Axes], title: str, panels: list[Panel]) -> None:
    for axes, draw in zip(places, panels, strict=True):
        draw(ax=axes)
        axes.set_title("")
        axes.set_ylabel("")
        for bar in axes.child_axes:
            if text_inches(bar.get_ylabel()) > _BAR_INCHES:
                bar.set_ylabel("")
        if axes.images:
            axes.set_anchor("N")
            if axes.images[0].origin == "lower":
                _number_ends(axes)
            else:
                _strip(axes)
    # What has three axes holds colours already.
    maps = [image for axes in places for image in axes.images if np.asarray(image.get_array()).ndim == 2]
    if maps:
        darkest, brightest = zip(*(image.get_clim() for image in maps), strict=True)
        for image in maps:
            image.set_clim(min(darkest), max(brightest))
    graphs = [axes for axes in places if not axes.images]
    if graphs:
        lowest, highest = zip(*(axes.get_ylim() for axes in graphs), strict=True)
        for axes in graphs:
            axes.set_ylim(min(lowest), max(highest))
    for axes in places[:-1]:
        axes.set_xlabel("")
    places[0].set_title(title, fontsize=_TITLE_POINTS)


def _strip(axes: Axes) -> None:
    bare(axes)
    axes.set_xlabel("")
    for text in tuple(axes.texts):
        text.remove()


def _number_ends(axes: Axes) -> None:
    """Number the first and the last row and column of a picture alone, as there is room for no more."""
    rows, cols = axes.images[0].get_size()
    axes.set_xticks(sorted({0, cols - 1}))
    axes.set_yticks(sorted({0, rows - 1}))


def plot_range(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the median of some values of every layer as a line, and the range from the lowest to the highest as a band.

    Args:
        frame: One row a layer; columns layer (from 0), lowest, median, highest, all above 0, as `token_norms` gives them.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes, whose vertical axis is logarithmic.

    Raises:
        InputError: If columns are missing, or there is no row.
    """
    what = "the table of ranges"
    check_columns(frame, ("layer", "lowest", "median", "highest"), what, "token_norms gives such a table")
    check_rows(frame, what, "measure at least one layer")
    with drawing_axes(ax, figure_size("icml")) as axes:
        axes.fill_between(frame["layer"], frame["lowest"], frame["highest"], color=OKABE_ITO[4], alpha=0.5, linewidth=0)
        axes.plot(frame["layer"], frame["median"], color=OKABE_ITO[0], marker=".", markersize=4)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("Network depth (layer)")
        axes.set_ylabel("Median and range")
    return axes
