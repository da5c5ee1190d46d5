"""Plots of several models on one figure: one row per model, one column per measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from vit_probe.errors import InputError
from vit_probe.plots.layout import check_columns, check_rows, hide_ticks_and_spines
from vit_probe.plots.style import OKABE_ITO, WIDTHS, drawing_axes, figure_size, style, text_inches

__all__ = ["Panel", "plot_comparison", "plot_range"]

Panel = Callable[..., Axes]
"""Function that draws on the axes that it receives as `ax`."""

_PANEL_INCHES = 1.17  # height of a row of panels
_TITLE_INCHES = 0.62  # height of the titles of a block of rows and of the labels of its horizontal axes
_TITLE_POINTS = 8
_BAR_INCHES = 0.85  # length of a colour bar beside a panel; a longer label is left out


def plot_comparison(rows: Mapping[str, Mapping[str, Panel]], *, columns: int = 5) -> Figure:
    """Draw the same measures of several models in a grid, with one measure per column on a common scale.

    The graphs of a column share their vertical limits, and its pictures share their colour limits. Pictures are drawn without
    ticks and texts, and colour bars without labels that are longer than the bar. Maps of layer against layer, whose origin is
    at the lower left, keep the numbers of the first and last layer. Measures that only some rows have are left out.

    Args:
        rows: Panels by title, by the name of the model. A title may have several lines, and should state the unit, since the
            label of the panel's own vertical axis is left out.
        columns: Number of measures side by side; further measures follow below, again for all models.

    Returns:
        A figure of a page's width (6.75 inches). Its axes are, row by row, the name of the row and then its panels.

    Raises:
        InputError: If there are no rows, the rows have no measure in common, or `columns` is below 1.

    Examples:
        >>> from functools import partial
        >>> import pandas as pd
        >>> table = pd.DataFrame({"layer": [0, 1], "lowest": [1, 2], "median": [2, 4], "highest": [4, 9]})
        >>> figure = plot_comparison({name: {"Norms": partial(plot_range, table)} for name in ("trained", "random")})
        >>> [ax.get_title() for ax in figure.axes]  # the name of a row, then its panel; only the first row has titles
        ['', 'Norms', '', '']
    """
    titles = [title for title in next(iter(rows.values()), {}) if all(title in panels for panels in rows.values())]
    if not titles:
        raise InputError(f"the {len(rows)} rows to compare have no panel in common; pass the same panels for each model")
    if columns < 1:
        raise InputError(f"cannot draw measures in {columns} columns; pass 1 or more")
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
                _remove_text(axes)
    # Pictures with three axes are already colours, and have no colour limits.
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


def _remove_text(axes: Axes) -> None:
    hide_ticks_and_spines(axes)
    axes.set_xlabel("")
    for text in tuple(axes.texts):
        text.remove()


def _number_ends(axes: Axes) -> None:
    """Number only the first and last row and column of a picture, as there is no room for more."""
    rows, cols = axes.images[0].get_size()
    axes.set_xticks(sorted({0, cols - 1}))
    axes.set_yticks(sorted({0, rows - 1}))


def plot_range(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the median of each layer's values as a line, and the range from lowest to highest as a band.

    Args:
        frame: One row per layer; columns layer (from 0), lowest, median and highest, all above 0, as in the table of
            `token_norms`.
        ax: Axes to draw on; if None, a new figure.

    Returns:
        The axes, whose vertical axis is logarithmic.

    Raises:
        InputError: If columns are missing, or the table has no rows.

    Examples:
        >>> import pandas as pd
        >>> ax = plot_range(pd.DataFrame({"layer": [0, 1], "lowest": [1, 2], "median": [2, 4], "highest": [4, 9]}))
        >>> ax.get_yscale()
        'log'
    """
    display_name = "the table of ranges"
    check_columns(frame, ("layer", "lowest", "median", "highest"), display_name, "pass a table like that of token_norms")
    check_rows(frame, display_name, "measure at least one layer")
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
