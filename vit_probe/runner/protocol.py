"""What the measures that go over a dataset have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

from vit_probe.attention.tiles import AttentionTile

__all__ = ["Measure", "PerImage"]


@runtime_checkable
class Measure(Protocol):
    """A streaming measure: an observer for `attention_hooks` whose sums can be merged, taken back and kept.

    One that makes nothing of small batches tells by `min_batch_size` how many images it needs in each.
    """

    @property
    def options(self) -> dict[str, Any]: ...

    def update(self, tile: AttentionTile) -> None: ...

    def begin_batch(self) -> None: ...

    def end_batch(self) -> None: ...

    def roll_back(self) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...

    def merge(self, other: Self) -> None: ...


@runtime_checkable
class PerImage(Protocol):
    """A measure that keeps something of each image, in the order in which they came."""

    def reorder(self, order: Sequence[int]) -> None: ...
