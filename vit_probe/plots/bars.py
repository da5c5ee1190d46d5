"""Colour bars beside graphs, and how large axes are printed."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar

__all__ = ["axes_inches", "bar_beside"]


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
