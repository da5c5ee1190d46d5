"""What a run asks of a measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from vit_probe.attention.tiles import AttentionTile
from vit_probe.results import Result

__all__ = ["Measure", "PerImage"]


@runtime_checkable
class Measure(Protocol):
    """A streaming measure: an observer for `attention_hooks` whose sums can be merged, undone and saved.

    A measure that needs several images in each batch says how many by `min_batch_size`.

    Attributes:
        name: Of the measure.
        options: What distinguishes this measure from others of its name.
    """

    name: str

    @property
    def options(self) -> dict[str, Any]: ...

    def update(self, tile: AttentionTile) -> None:
        """Take a tile of attention."""

    def begin_batch(self) -> None:
        """Remember the present state for `roll_back`."""

    def end_batch(self) -> None:
        """Count the batch in."""

    def roll_back(self) -> None:
        """Forget everything since `begin_batch`, also where the batch had ended."""

    def state(self) -> dict[str, Any]:
        """What `restore` needs to continue from here: arrays, and what JSON can hold."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to where `state` was taken, of a measure with the same name and options."""

    def merge(self, other: Self) -> None:
        """Add the images of `other`, behind those of this measure. Either may be empty."""

    def compute(
        self, provenance: dict[str, Any] | None = None, *, names: list[str] | None = None, images: np.ndarray | None = None
    ) -> Result:
        """The result over all images so far.

        Args:
            provenance: Where the numbers come from.
            names: Name of each image.
            images: The first images, uint8 (image, height, width, channel), for display.
        """
        ...


@runtime_checkable
class PerImage(Protocol):
    """A measure that keeps something of each image, in the order in which they came."""

    def reorder(self, order: Sequence[int]) -> None:
        """Put the images into another order: first the one that was the `order[0]`-th."""
