"""Layout shared by the plots: mosaics of tiles, rows of panels, colour bars, and checks of the tables that are drawn.

All sizes are in inches as printed, because the plots decide from them which labels have room.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from vit_probe.errors import InputError
from vit_probe.plots.style import text_inches

__all__ = [
    "BAR_INCHES",
    "LOW_PICTURE_BAR_INCHES",
    "LOW_PICTURE_INCHES",
    "arrange",
    "axes_inches",
    "bar_axes",
    "bar_beside",
    "bar_margins",
    "bar_with_ends",
    "check_columns",
    "check_rows",
    "hide_ticks_and_spines",
    "inches_per_pixel",
    "label_across",
    "mosaic",
    "panel_row",
    "show_message",
    "tile_centres",
    "title_inches",
]

BAR_INCHES = 0.55
"""Width reserved to the right of a picture for `bar_with_ends`."""
LOW_PICTURE_INCHES = 0.7
"""Height below which the label of `bar_with_ends` no longer fits between the words at its ends, and stands to their right."""
LOW_PICTURE_BAR_INCHES = 0.72
"""Width reserved for `bar_with_ends` beside such a low picture."""

_SHORTEST_BAR_INCHES = 0.34  # the numbers at the two ends of a shorter colour bar would overlap
_TITLE_LINE_INCHES = 0.135  # per line of an 8-point title
_TITLE_PADDING_INCHES = 0.11


# Mosaics


def mosaic(tiles: NDArray[Any], *, gap: tuple[int, int], fill: float) -> NDArray[Any]:
    """Assemble tiles into one picture.

    Args:
        tiles: (tile_row, tile_col, row, col, ...); further axes, such as colour channels, are kept.
        gap: Pixels between rows of tiles, and between columns of tiles.
        fill: Value of the pixels in the gaps.

    Returns:
        (row, col, ...), of the same dtype.
    """
    tile_rows, tile_cols, height, width, *rest = tiles.shape
    shape = (tile_rows * (height + gap[0]) - gap[0], tile_cols * (width + gap[1]) - gap[1], *rest)
    picture = np.full(shape, fill, dtype=tiles.dtype)
    for row in range(tile_rows):
        for col in range(tile_cols):
            top, left = row * (height + gap[0]), col * (width + gap[1])
            picture[top : top + height, left : left + width] = tiles[row, col]
    return picture


def arrange(tiles: NDArray[Any], columns: int, *, fill: float) -> NDArray[Any]:
    """Arrange tiles (tile, row, col, ...) in rows of `columns` for `mosaic`; empty places in the last row hold `fill`."""
    rows = -(-len(tiles) // columns)
    padded = np.full((rows * columns, *tiles.shape[1:]), fill, dtype=tiles.dtype)
    padded[: len(tiles)] = tiles
    return padded.reshape(rows, columns, *tiles.shape[1:])


def tile_centres(count: int, size: int, gap: int) -> NDArray[np.float64]:
    """Centres of `count` tiles of `size` pixels along one side of a mosaic, in the pixel coordinates of `imshow`."""
    return np.arange(count, dtype=np.float64) * (size + gap) + (size - 1) / 2


def inches_per_pixel(axes: Axes, height: int, width: int) -> float:
    """Approximate printed size of one pixel of a (height, width) picture that fills the axes."""
    box = axes.get_window_extent()
    return float(min(box.width / width, box.height / height) / axes.figure.dpi)


# Axes


def axes_inches(axes: Axes) -> tuple[float, float]:
    """Printed width and height of the axes."""
    box, dpi = axes.get_window_extent(), axes.figure.dpi
    return float(box.width / dpi), float(box.height / dpi)


def hide_ticks_and_spines(axes: Axes) -> None:
    """Remove ticks and spines, as suits a picture."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def show_message(axes: Axes, title: str, message: str) -> None:
    """Draw a grey square with a message, in place of a picture that is not available."""
    hide_ticks_and_spines(axes)
    axes.set(title=title, facecolor="#F3F3F3", box_aspect=1)
    axes.text(0.5, 0.5, message, ha="center", va="center", transform=axes.transAxes)


# Colour bars


def bar_beside(axes: Axes, mappable: ScalarMappable, inches: float, **options: Any) -> Colorbar:
    """Draw a colour bar to the right of the axes and as high as they are.

    Args:
        axes: Axes that the colours belong to.
        mappable: Artist that the colours belong to.
        inches: Thickness of the bar, and its distance from the axes.
        options: Passed to `Figure.colorbar`.
    """
    thickness = inches / axes_inches(axes)[0]
    bar = axes.inset_axes((1 + thickness, 0.0, thickness, 1.0))
    return axes.figure.colorbar(mappable, cax=bar, **options)


def bar_axes(axes: Axes, width: float, height: float) -> Axes:
    """Create axes for a slim colour bar beside a picture of (width, height) inches.

    The bar is as high as the picture, or higher where its two numbers would otherwise overlap.
    """
    thickness, length = 0.1 / width, max(1.0, _SHORTEST_BAR_INCHES / height)
    return axes.inset_axes((1 + thickness, 0.5 - length / 2, thickness, length))


def bar_with_ends(axes: Axes, width: float, height: float, ends: tuple[str, str], label: str) -> None:
    """Draw a viridis colour bar that has a word at each end instead of a scale.

    Args:
        axes: Axes of the picture; the bar is drawn to their right.
        width: Width of the picture, in inches.
        height: Height of the picture, in inches.
        ends: Words at the lower and at the upper end.
        label: Label between them.
    """
    place = bar_axes(axes, width, height)
    bar: Any = axes.figure.colorbar(ScalarMappable(Normalize(0, 1), "viridis"), cax=place, ticks=[0, 1])
    place.set_yticklabels(ends)
    bar.set_label(label, labelpad=-12 if height >= LOW_PICTURE_INCHES else 2)
    bar.outline.set_visible(False)


def bar_margins(height: float, bottom: float, top: float) -> tuple[float, float, float]:
    """Bottom, right and top margins of a picture of this height with `bar_with_ends`, at least `bottom` and `top`."""
    # The label of the bar sticks out below and above a picture that is lower than the label is long.
    overhang = (LOW_PICTURE_INCHES - height) / 2
    right = LOW_PICTURE_BAR_INCHES if height < LOW_PICTURE_INCHES else BAR_INCHES
    return max(bottom, overhang), right, max(top, overhang)


# Rows of panels


def panel_row(
    figure: Figure | SubFigure, count: int, margins: tuple[float, float, float, float], *, gap: float = 0.12
) -> list[Axes]:
    """Fill a figure with axes side by side.

    Args:
        figure: Figure to fill.
        count: Number of axes.
        margins: Left, bottom, right and top margins of the row, in inches.
        gap: Inches between neighbouring axes.
    """
    width, height = figure.bbox.width / figure.dpi, figure.bbox.height / figure.dpi
    left, bottom, right, top = margins
    panel = (width - left - right - gap * (count - 1)) / count
    boxes = [(left + index * (panel + gap), bottom, panel, height - bottom - top) for index in range(count)]
    return [figure.add_axes((x / width, y / height, w / width, h / height)) for x, y, w, h in boxes]


def title_inches(titles: Iterable[str]) -> float:
    """Margin above a row of panels that fits the title with the most lines."""
    return _TITLE_PADDING_INCHES + _TITLE_LINE_INCHES * max(len(title.splitlines()) for title in titles)


def label_across(panels: Sequence[Axes], text: str) -> None:
    """Label the horizontal axis of each panel, or of the middle one alone where the label is wider than a panel."""
    boxes = [panel.get_window_extent() for panel in panels]
    fits = text_inches(text) <= boxes[0].width / panels[0].figure.dpi
    offsets = [abs(box.x0 + box.x1 - boxes[0].x0 - boxes[-1].x1) for box in boxes]
    for panel, offset in zip(panels, offsets, strict=True):
        panel.set_xlabel(text if fits or offset == min(offsets) else "")


# Tables


def check_columns(frame: pd.DataFrame, columns: Sequence[str], display_name: str, remedy: str) -> None:
    """Raise InputError if columns are missing.

    Args:
        frame: Table to check.
        columns: Columns that it must have.
        display_name: Name of the table in the error message.
        remedy: End of the error message, which says where to get such a table.
    """
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise InputError(f"{display_name} lacks the columns {', '.join(missing)}; {remedy}")


def check_rows(frame: pd.DataFrame, display_name: str, remedy: str) -> None:
    """Raise InputError if the table has no rows; `display_name` and `remedy` are those of `check_columns`."""
    if frame.empty:
        raise InputError(f"{display_name} has no rows; {remedy}")
