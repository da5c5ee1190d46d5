"""What measures with a map for every image have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from vit_probe.errors import InputError
from vit_probe.results import check_finite
from vit_probe.tokens.grid import TokenGrid

__all__ = ["PerImageMaps"]


class PerImageMaps(ABC):
    """A streaming measure that keeps one map, or several, of every image, in the order in which the images came.

    Args:
        grid: Where the patches lie.
    """

    name: str
    display_name: str  # what is measured, for messages

    def __init__(self, grid: TokenGrid) -> None:
        self.grid = grid
        self._maps: list[np.ndarray] = []  # of each batch, (image, ..., row, col)
        self._before = 0  # how many of them there were before the current batch

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What distinguishes this measure from others of its name, for provenance."""

    @abstractmethod
    def _finish_batch(self) -> None:
        """Append the maps of the current batch, if there is one."""

    def begin_batch(self) -> None:
        """Remember the present state for `roll_back`."""
        self._finish_batch()
        self._before = len(self._maps)

    def end_batch(self) -> None:
        """Count the batch in.

        Raises:
            InputError: If its maps hold NaN or infinity.
        """
        self._finish_batch()
        for maps in self._maps[self._before :]:
            check_finite(maps, self.display_name)

    def roll_back(self) -> None:
        """Forget everything since `begin_batch`, also where the batch had ended."""
        del self._maps[self._before :]

    def state(self) -> dict[str, Any]:
        """What `restore` needs to continue from here: arrays, and what JSON can hold."""
        self._finish_batch()
        none = np.zeros((0, self.grid.rows, self.grid.cols), dtype=np.float32)
        return {"maps": np.concatenate(self._maps) if self._maps else none}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to where `state` was taken, of a measure with the same grid and options."""
        self._maps = [state["maps"]] if len(state["maps"]) else []

    def merge(self, other: Self) -> None:
        """Append the maps of `other`.

        Raises:
            InputError: If `other` has another grid or other options.
        """
        mine, theirs = ((measure.grid, measure.options) for measure in (self, other))
        if mine != theirs:
            raise InputError(f"cannot merge {self.display_name} of (grid, options) {theirs} into {mine}")
        for measure in (self, other):
            measure._finish_batch()
        self._maps += other._maps

    def reorder(self, order: Sequence[int]) -> None:
        """Put the maps into another order: first those of the image that was the `order[0]`-th."""
        self._finish_batch()
        self._maps = [np.concatenate(self._maps)[list(order)]] if self._maps else []

    def _result(self, provenance: dict[str, Any] | None, names: list[str] | None, images: np.ndarray | None) -> dict[str, Any]:
        """The fields that the results of all such measures have: maps, images, names and provenance.

        Raises:
            InputError: If there were no images, or the maps hold NaN.
        """
        self._finish_batch()
        if not self._maps:
            raise InputError("no attention has been measured yet")
        maps = np.concatenate(self._maps)
        check_finite(maps, self.display_name)
        names = names or [f"image {index}" for index in range(len(maps))]
        return {"maps": maps, "images": images, "names": names, "provenance": provenance or {}}
