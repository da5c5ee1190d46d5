"""Colour bars beside graphs, and how large axes are printed."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize

from vit_probe.plots.mosaic import bar_axes

__all__ = ["BAR_INCHES", "LOW", "LOW_BAR_INCHES", "axes_inches", "bar_beside", "bar_margins", "bar_of_ends"]

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
