"""First-layer filters as small colour pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vit_probe.errors import InputError
from vit_probe.plots.layout import arrange, bare, mosaic
from vit_probe.plots.style import WIDTHS, drawing_axes, fitting_text, style, text_inches

__all__ = [
    "plot_filter_panels",
    "plot_patch_filters",
    "scaled_filters",
]


_MARGIN = 0.03  # inches
_TITLE_POINTS = 9
_LONGEST_TITLE = 40  # characters of that size that fit a column of 3.25 inches
_TALLEST = 8.5  # inches; what a page leaves for a figure
_COLUMNS = 7  # as in the paper, whose 28 components make four lines
_FEW = 28


def plot_patch_filters(
    filters: NDArray[Any], *, columns: int | None = None, title: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draw filters as a mosaic, each scaled jointly over its channels to [0, 1].

    Serves the principal components of a ViT's patch embedding as well as the raw first layer of any convolutional
    model, such as AlexNet's (64, 3, 11, 11).

    Args:
        filters: (filter, channel, row, col), one channel (grey) or three (RGB).
        columns: Filters in a line; the last line may be shorter. If None, 7 for up to 28 filters, and for more filters
            so many that the mosaic is about as wide as high.
        title: Written above; a long one is broken before its parenthesis. A new figure is wide enough for it.
        ax: Where to draw; a new figure of a column's width if None.

    Returns:
        The axes, holding one image: the mosaic, with white gaps.

    Raises:
        InputError: If the shape is another, a value is not finite, or `columns` is not positive.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7 (left).
    """
    scaled = scaled_filters(filters)
    height, width = scaled.shape[1:3]
    gap = max(1, round(max(height, width) / 14))
    if columns is None:
        square = math.ceil((len(scaled) * (height + gap) / (width + gap)) ** 0.5)
        columns = _COLUMNS if len(scaled) <= _FEW else max(_COLUMNS, square)
    if columns < 1:
        raise InputError(f"cannot draw filters in {columns} columns; give 1 or more")
    columns = min(columns, len(scaled))
    picture = mosaic(arrange(scaled, columns, fill=1.0), gap=(gap, gap), fill=1.0)
    aspect = picture.shape[0] / picture.shape[1]
    inches = min(WIDTHS["icml"] - 2 * _MARGIN, _TALLEST / aspect)
    if title is not None and len(title) > _LONGEST_TITLE:
        title = title.replace(" (", "\n(")
    top = _MARGIN if title is None else 0.1 + 0.15 * len(title.splitlines())
    side = _MARGIN + max(0.0, text_inches(title or "", _TITLE_POINTS) - inches) / 2
    size = (inches + 2 * side, inches * aspect + top + _MARGIN)
    with drawing_axes(ax, size, (side, _MARGIN, side, top)) as axes:
        axes.imshow(picture, interpolation="nearest", aspect="equal")
        bare(axes)
        if title is not None:
            axes.set_title(title)
    return axes


def scaled_filters(filters: NDArray[Any]) -> NDArray[np.float64]:
    """Filters ready for `imshow`: (filter, row, col, 3) in [0, 1], a constant filter being mid grey.

    Raises:
        InputError: If `filters` is not (filter, channel, row, col) with 1 or 3 channels, or not finite.
    """
    values = np.asarray(filters, dtype=np.float64)
    if values.ndim != 4 or values.shape[1] not in (1, 3) or 0 in values.shape:
        raise InputError(
            f"filters have shape {values.shape}; they must be (filter, channel, row, col), none empty, with 1 or 3 channels"
        )
    if not np.isfinite(values).all():
        raise InputError("filters hold values that are not finite; check the weights they come from")
    lowest = values.min(axis=(1, 2, 3), keepdims=True)
    extent = values.max(axis=(1, 2, 3), keepdims=True) - lowest
    scaled = np.where(extent > 0, (values - lowest) / np.where(extent > 0, extent, 1.0), 0.5)
    return np.broadcast_to(scaled, (len(scaled), 3, *scaled.shape[2:])).transpose(0, 2, 3, 1)


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
