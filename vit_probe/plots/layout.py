"""Small pictures side by side in one large one."""

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
    "LOW",
    "LOW_BAR_INCHES",
    "arrange",
    "axes_inches",
    "bar_axes",
    "bar_beside",
    "bar_margins",
    "bar_of_ends",
    "bare",
    "centres",
    "check_columns",
    "check_rows",
    "inches_per_pixel",
    "label_across",
    "mosaic",
    "panel_row",
    "say_instead",
    "title_inches",
]


_SHORTEST_BAR = 0.34  # inches; the numbers at the two ends of a shorter colour bar would collide


def mosaic(tiles: NDArray[Any], *, gap: tuple[int, int], fill: float) -> NDArray[Any]:
    """Lay tiles out on one picture.

    Args:
        tiles: (tile_row, tile_col, row, col, ...), further axes (colour channels) being kept.
        gap: Pixels between rows of tiles, and between columns of tiles.
        fill: What the gaps hold.

    Returns:
        (row, col, ...) of the same dtype.
    """
    down, across, height, width, *rest = tiles.shape
    shape = (down * (height + gap[0]) - gap[0], across * (width + gap[1]) - gap[1], *rest)
    picture = np.full(shape, fill, dtype=tiles.dtype)
    for row in range(down):
        for col in range(across):
            top, left = row * (height + gap[0]), col * (width + gap[1])
            picture[top : top + height, left : left + width] = tiles[row, col]
    return picture


def arrange(tiles: NDArray[Any], columns: int, *, fill: float) -> NDArray[Any]:
    """Break a series (tile, row, col, ...) into lines of `columns`; places left over in the last line hold `fill`."""
    lines = -(-len(tiles) // columns)
    padded = np.full((lines * columns, *tiles.shape[1:]), fill, dtype=tiles.dtype)
    padded[: len(tiles)] = tiles
    return padded.reshape(lines, columns, *tiles.shape[1:])


def centres(count: int, size: int, gap: int) -> NDArray[np.float64]:
    """Where `count` tiles of `size` pixels have their middle, in the pixel coordinates of `imshow`."""
    return np.arange(count, dtype=np.float64) * (size + gap) + (size - 1) / 2


def inches_per_pixel(ax: Axes, height: int, width: int) -> float:
    """How large a pixel of a picture of (height, width) is printed on these axes, near enough to place text."""
    box = ax.get_window_extent()
    return float(min(box.width / width, box.height / height) / ax.figure.dpi)


def bar_axes(ax: Axes, width: float, height: float) -> Axes:
    """Axes for a slim colour bar beside a picture of (width, height) inches: as high as it, if that is legible."""
    thickness, length = 0.1 / width, max(1.0, _SHORTEST_BAR / height)
    return ax.inset_axes((1 + thickness, 0.5 - length / 2, thickness, length))


def bare(ax: Axes) -> None:
    """Take ticks and spines away."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def say_instead(ax: Axes, title: str, text: str) -> None:
    """A grey square with a few words, in place of a picture that there is none of."""
    bare(ax)
    ax.set(title=title, facecolor="#F3F3F3", box_aspect=1)
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes)


BAR_INCHES = 0.55
"""Room to the right of a picture for its `bar_of_ends`."""
LOW = 0.7
"""Inches; on a lower bar, the label stands beyond the words at its ends."""
LOW_BAR_INCHES = 0.72
"""Room to the right of a picture that is so low."""


def axes_inches(axes: Axes) -> tuple[float, float]:
    """Width and height of the axes as they are printed."""
    box, dpi = axes.get_window_extent(), axes.figure.dpi
    return float(box.width / dpi), float(box.height / dpi)


def bar_beside(axes: Axes, marks: ScalarMappable, inches: float, **options: Any) -> Colorbar:
    """The colour bar of some marks, as high as the axes, so many inches thick and as far to their right.

    Args:
        axes: Where the marks are.
        marks: What the colours are of.
        inches: Thickness, and distance from the axes.
        options: Of `Figure.colorbar`.
    """
    thickness = inches / axes_inches(axes)[0]
    place = axes.inset_axes((1 + thickness, 0.0, thickness, 1.0))
    return axes.figure.colorbar(marks, cax=place, **options)


def bar_of_ends(axes: Axes, width: float, height: float, ends: tuple[str, str], label: str) -> None:
    """Say what colours from viridis' first to its last mean, to the right of a picture of so many inches.

    Args:
        axes: Of the picture.
        width: Of the picture, in inches.
        height: Of the picture, in inches.
        ends: What is written at the bar's lower and upper end.
        label: What is between.
    """
    place = bar_axes(axes, width, height)
    bar: Any = axes.figure.colorbar(ScalarMappable(Normalize(0, 1), "viridis"), cax=place, ticks=[0, 1])
    place.set_yticklabels(ends)
    bar.set_label(label, labelpad=-12 if height >= LOW else 2)
    bar.outline.set_visible(False)


def bar_margins(height: float, bottom: float, top: float) -> tuple[float, float, float]:
    """Bottom, right and top margin, in inches, of a picture of this height with its `bar_of_ends`, and at least this below and
    above it.
    """
    spare = (LOW - height) / 2
    return max(bottom, spare), LOW_BAR_INCHES if height < LOW else BAR_INCHES, max(top, spare)


_LINE_INCHES = 0.135  # of a title of 8 points
_ABOVE_TITLE = 0.11


def panel_row(
    figure: Figure | SubFigure, count: int, margins: tuple[float, float, float, float], *, gap: float = 0.12
) -> list[Axes]:
    """Axes side by side that fill a figure.

    Args:
        figure: Where to put them.
        count: How many.
        margins: Left, bottom, right and top of the row, in inches.
        gap: Inches between neighbours.
    """
    width, height = figure.bbox.width / figure.dpi, figure.bbox.height / figure.dpi
    left, bottom, right, top = margins
    panel = (width - left - right - gap * (count - 1)) / count
    boxes = [(left + index * (panel + gap), bottom, panel, height - bottom - top) for index in range(count)]
    return [figure.add_axes((x / width, y / height, w / width, h / height)) for x, y, w, h in boxes]


def title_inches(titles: Iterable[str]) -> float:
    """The margin that titles of so many lines need above the panels."""
    return _ABOVE_TITLE + _LINE_INCHES * max(len(title.splitlines()) for title in titles)


def label_across(panels: Sequence[Axes], text: str) -> None:
    """Names the horizontal axis below each panel where there is room for that, else below the one in the middle alone."""
    boxes = [panel.get_window_extent() for panel in panels]
    fits = text_inches(text) <= boxes[0].width / panels[0].figure.dpi
    offsets = [abs(box.x0 + box.x1 - boxes[0].x0 - boxes[-1].x1) for box in boxes]
    for panel, offset in zip(panels, offsets, strict=True):
        panel.set_xlabel(text if fits or offset == min(offsets) else "")


def check_columns(frame: pd.DataFrame, columns: Sequence[str], what: str, remedy: str) -> None:
    """Raise InputError if columns are missing.

    Args:
        frame: The table.
        columns: What it must have.
        what: The table in words, for the message.
        remedy: Where to get such a table, for the message.
    """
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise InputError(f"{what} lacks the columns {', '.join(missing)}; {remedy}")


def check_rows(frame: pd.DataFrame, what: str, remedy: str) -> None:
    """Raise InputError if there is no row; `what` and `remedy` as for `check_columns`."""
    if frame.empty:
        raise InputError(f"{what} has no rows; {remedy}")
