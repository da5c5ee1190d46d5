"""First-layer filters as small colour pictures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from vit_probe.errors import InputError
from vit_probe.plots.mosaic import arrange, bare, mosaic
from vit_probe.plots.style import WIDTHS, drawing_axes, text_inches

__all__ = ["plot_patch_filters", "scaled_filters"]

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
