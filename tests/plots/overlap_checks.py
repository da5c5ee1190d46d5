"""Checks that nothing in a drawn figure is cut off or overlaps."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

from matplotlib.figure import Figure
from matplotlib.transforms import BboxBase


def assert_inside(figure: Figure, boxes: Iterable[BboxBase | None]) -> None:
    """Assert that no box is cut off at an edge of the figure."""
    for box in boxes:
        assert box is not None
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1


def assert_apart(boxes: Iterable[BboxBase]) -> None:
    """Assert that no two boxes overlap."""
    for one, other in combinations(boxes, 2):
        assert not one.overlaps(other)
