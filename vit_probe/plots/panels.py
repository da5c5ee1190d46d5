"""Panels of one size side by side, with what they share said once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from vit_probe.plots.style import text_inches

__all__ = ["label_across", "panel_row", "title_inches"]

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
