"""Aligned attention: where heads attend relative to the query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from vit_probe.errors import InputError
from vit_probe.plots.layout import hide_ticks_and_spines
from vit_probe.plots.style import WIDTHS, drawing_axes

__all__ = ["plot_aligned_attention"]

_GAP = 0.12  # between maps, in units of a map's width
_LABEL_INCHES = (0.5, 0.45)  # left of the maps and below them
_MOST_INCHES = 9.0  # of height, which a page has


def plot_aligned_attention(aligned: NDArray[Any], *, layers: Sequence[int] | None = None, ax: Axes | None = None) -> Axes:
    """Draw one map per head, one row per layer, in which the query lies in the centre, marked by a cross.

    Each map has a scale of its own, from 0 to its largest value. Colours follow the square root, so that what surrounds a sharp
    peak is visible.

    Args:
        aligned: (layer, head, row offset, col offset), as `attention_offset` gives them; NaN where a layer has fewer heads
            or patches.
        layers: Which layers to draw, from 0; all if None.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes; its images are the maps, layer by layer.

    Raises:
        InputError: If the array has another number of axes, or there is no such layer.

    References:
        Walmer et al. 2023, arXiv:2212.03862, figures 3 and 4.

    Examples:
        >>> ax = plot_aligned_attention(np.ones((2, 3, 5, 5)))
        >>> len(ax.images)
        6
    """
    maps = np.asarray(aligned, dtype=float)
    if maps.ndim != 4 or 0 in maps.shape:
        raise InputError(f"aligned attention has axes (layer, head, row offset, col offset), got shape {maps.shape}")
    numbers = list(range(len(maps))) if layers is None else list(layers)
    if not numbers or any(not 0 <= number < len(maps) for number in numbers):
        raise InputError(f"layers {numbers} were asked for, but there are layers 0 to {len(maps) - 1}; name some of those")
    heads, height, width = maps.shape[1:]
    ratio = height / width
    height_inches = _LABEL_INCHES[1] + (WIDTHS["neurips"] - _LABEL_INCHES[0]) * len(numbers) * (ratio + _GAP) / (
        heads * (1 + _GAP)
    )
    with drawing_axes(ax, (WIDTHS["neurips"], min(height_inches, _MOST_INCHES))) as axes:
        for row, number in enumerate(numbers):
            for head in range(heads):
                there = ~np.isnan(maps[number, head])
                if not there.any():
                    continue
                # A layer of fewer patches has a smaller map, with NaN to the right of it and below.
                one = maps[number, head][there.any(axis=1)][:, there.any(axis=0)]
                left, top = head * (1 + _GAP), row * (ratio + _GAP)
                extent = (left, left + 1, top + ratio, top)
                axes.imshow(np.sqrt(one), cmap="viridis", vmin=0, extent=extent, interpolation="nearest")
                axes.plot(left + 0.5, top + ratio / 2, marker="+", color="white", markersize=3, markeredgewidth=0.6)
        axes.set_xlim(-_GAP, heads * (1 + _GAP))
        axes.set_ylim(len(numbers) * (ratio + _GAP), -_GAP)
        axes.set_aspect("equal", anchor="N")
        hide_ticks_and_spines(axes)
        axes.set_yticks([row * (ratio + _GAP) + ratio / 2 for row in range(len(numbers))], list(map(str, numbers)))
        axes.set_xticks([head * (1 + _GAP) + 0.5 for head in range(heads)], list(map(str, range(heads))))
        axes.tick_params(length=0)
        axes.set_xlabel("Head")
        axes.set_ylabel("Network depth (layer)")
    return axes
