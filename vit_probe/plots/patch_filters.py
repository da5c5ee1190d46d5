"""First-layer filters as small colour pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vit_probe.errors import InputError
from vit_probe.plots.layout import arrange, hide_ticks_and_spines, mosaic
from vit_probe.plots.style import WIDTHS, drawing_axes, fitting_text, style, text_inches

__all__ = ["plot_filter_panels", "plot_patch_filters"]

_MAX_HEIGHT = 8.5  # inches that a page leaves for a figure

# One mosaic
_MARGIN = 0.03  # inches
_TITLE_POINTS = 9
_MAX_TITLE_LENGTH = 40  # characters of that size that fit a column of 3.25 inches
_COLUMNS = 7  # as in the paper, whose 28 components make four rows
_MAX_PAPER_FILTERS = 28
_DRAWN_CHANNELS = (1, 3)  # grey and RGB
_GAPS_BETWEEN_FILTERS = 4  # from the last channel of a filter to the first of the next, in gaps between its channels

# Several mosaics side by side
_PANEL_GAP = 0.06  # between two panels, as a fraction of a panel's width
_PANEL_WIDTH = 0.94  # of a mosaic, as a fraction of the panel's share of the figure's width
_PANEL_TITLE_POINTS = 8
_PANEL_TITLE_INCHES, _PANEL_LINE_INCHES = 0.13, 0.13  # above a mosaic, and per line of its title


def plot_patch_filters(
    filters: NDArray[Any],
    *,
    channels: Sequence[int] | None = None,
    columns: int | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw filters as a mosaic, each scaled jointly over its channels to [0, 1].

    The filters may be the principal components of a ViT's patch embedding or the raw first layer of any convolutional
    model, such as AlexNet's (64, 3, 11, 11).

    Args:
        filters: (filter, channel, row, col). One channel is drawn grey, three as RGB, any others as a row of grey tiles side by
            side, one per channel.
        channels: Draw these channels only: one, or three as red, green and blue, such as (3, 2, 1) of Sentinel-2's bands.
        columns: Filters per row; the last row may be shorter. If None, 7 for up to 28 filters of one or three channels; for
            others, the number that makes the mosaic about as wide as high.
        title: Title above the mosaic; a long one is broken before its parenthesis. A new figure is made wide enough for it.
        ax: Axes to draw on; if None, a new figure of a column's width.

    Returns:
        The axes, holding one image: the mosaic, with white gaps.

    Raises:
        InputError: If `filters` has another shape or values that are not finite, it has not all `channels`, or `columns` is not
            positive.

    Examples:
        >>> import numpy as np
        >>> filters = np.random.default_rng(0).normal(size=(28, 3, 16, 16))
        >>> ax = plot_patch_filters(filters, title="Patch filters")
        >>> ax.images[0].get_array().shape  # 4 rows of 7 filters, 1 pixel apart
        (67, 118, 3)

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7 (left).
    """
    scaled = _scaled_filters(filters, channels)
    gap = max(1, round(max(scaled.shape[2:]) / 14))
    has_colours = scaled.shape[1] in _DRAWN_CHANNELS
    tiles = _in_colours(scaled) if has_colours else _side_by_side(scaled, gap)
    height, width = tiles.shape[1:3]
    if columns is None:
        columns = math.ceil((len(tiles) * (height + gap) / (width + gap)) ** 0.5)
        if has_colours:
            columns = _COLUMNS if len(tiles) <= _MAX_PAPER_FILTERS else max(_COLUMNS, columns)
    if columns < 1:
        raise InputError(f"cannot draw filters in {columns} columns; pass 1 or more")
    columns = min(columns, len(tiles))
    between = gap if has_colours else _GAPS_BETWEEN_FILTERS * gap
    picture = mosaic(arrange(tiles, columns, fill=1.0), gap=(gap, between), fill=1.0)
    aspect = picture.shape[0] / picture.shape[1]
    inches = min(WIDTHS["icml"] - 2 * _MARGIN, _MAX_HEIGHT / aspect)
    if title is not None and len(title) > _MAX_TITLE_LENGTH:
        title = title.replace(" (", "\n(")
    top = _MARGIN if title is None else 0.1 + 0.15 * len(title.splitlines())
    side = _MARGIN + max(0.0, text_inches(title or "", _TITLE_POINTS) - inches) / 2
    size = (inches + 2 * side, inches * aspect + top + _MARGIN)
    with drawing_axes(ax, size, (side, _MARGIN, side, top)) as axes:
        axes.imshow(picture, interpolation="nearest", aspect="equal")
        hide_ticks_and_spines(axes)
        if title is not None:
            axes.set_title(title)
    return axes


def plot_filter_panels(panels: Mapping[str, NDArray[Any]], *, figure: Figure | None = None) -> Figure:
    """Draw several sets of filters side by side, each as `plot_patch_filters` does.

    Args:
        panels: (filter, channel, row, col) by title, from left to right. A title may have several lines; a line that is too
            long is shortened.
        figure: Figure to draw on; if None, a new one of a column's width (5.5 inches).

    Returns:
        The figure; its axes are the panels, from left to right.

    Raises:
        InputError: If `panels` is empty, or `plot_patch_filters` cannot draw one of the sets.

    Examples:
        >>> import numpy as np
        >>> random = np.random.default_rng(0)
        >>> figure = plot_filter_panels({"ViT": random.normal(size=(28, 3, 8, 8)), "CNN": random.normal(size=(16, 3, 5, 5))})
        >>> [ax.get_title() for ax in figure.axes]
        ['ViT', 'CNN']

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7 (left).
    """
    if not panels:
        raise InputError("there are no filters to draw; pass at least one set, by title")
    if figure is None:
        with style():
            figure = Figure(figsize=(WIDTHS["neurips"], WIDTHS["neurips"] / len(panels)))
            figure.set_layout_engine("constrained", wspace=_PANEL_GAP)
            plot_filter_panels(panels, figure=figure)
        # Only the drawn mosaics tell how high the figure must be.
        pictures = [axes.images[0].get_size() for axes in figure.axes]
        lines = max(len(title.splitlines()) for title in panels)
        highest = max(rows / cols for rows, cols in pictures) * _PANEL_WIDTH * figure.get_figwidth() / len(panels)
        figure.set_figheight(min(highest + _PANEL_TITLE_INCHES + lines * _PANEL_LINE_INCHES, _MAX_HEIGHT))
        return figure
    width = _PANEL_WIDTH * figure.get_figwidth() / len(panels)
    for axes, (title, filters) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        plot_patch_filters(filters, ax=axes)
        axes.set_anchor("N")
        lines_shown = [fitting_text(line, width, _PANEL_TITLE_POINTS) for line in title.splitlines()]
        axes.set_title("\n".join(lines_shown), fontsize=_PANEL_TITLE_POINTS, parse_math=False)
    return figure


def _scaled_filters(filters: NDArray[Any], channels: Sequence[int] | None) -> NDArray[np.float64]:
    """Scale filters, or the given channels of them, to [0, 1]; a constant filter becomes mid-grey.

    Raises:
        InputError: If `filters` is not (filter, channel, row, col), has not these channels, or is not finite.
    """
    values = np.asarray(filters, dtype=np.float64)
    if values.ndim != 4 or 0 in values.shape:
        raise InputError(f"filters have shape {values.shape}; they must be (filter, channel, row, col), none empty")
    if channels is not None:
        if len(channels) not in _DRAWN_CHANNELS or not all(0 <= channel < values.shape[1] for channel in channels):
            raise InputError(f"channels must be one or three of 0 to {values.shape[1] - 1}, got {tuple(channels)}")
        values = values[:, list(channels)]
    if not np.isfinite(values).all():
        raise InputError("filters have values that are not finite; check the weights that they come from")
    lowest = values.min(axis=(1, 2, 3), keepdims=True)
    extent = values.max(axis=(1, 2, 3), keepdims=True) - lowest
    return np.where(extent > 0, (values - lowest) / np.where(extent > 0, extent, 1.0), 0.5)


def _in_colours(scaled: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pictures (filter, row, col, 3) of filters of one channel, grey, or of three."""
    return np.broadcast_to(scaled, (len(scaled), 3, *scaled.shape[2:])).transpose(0, 2, 3, 1)


def _side_by_side(scaled: NDArray[np.float64], gap: int) -> NDArray[np.float64]:
    """Pictures (filter, row, col, 3) in which the channels of a filter are grey tiles, from left to right."""
    strips = np.stack([mosaic(channels[None], gap=(0, gap), fill=1.0) for channels in scaled])
    return _in_colours(strips[:, None])
