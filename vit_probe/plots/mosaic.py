"""Small pictures side by side in one large one."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

__all__ = ["arrange", "bar_axes", "bare", "centres", "inches_per_pixel", "mosaic", "say_instead"]

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
