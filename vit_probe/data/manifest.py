"""What a stream of images has gone through: names, hashes, what was left out, and photographs kept for display."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vit_probe.errors import InputError

__all__ = ["ImageManifest"]


@dataclass
class ImageManifest:
    """What a stream of images has gone through so far.

    Args:
        position: How many images of the whole list it is past.
        names: Of the images that it has given.
        indices: Their numbers in the whole list, from 0.
        digests: Hashes of their pixels.
        skipped: Name and reason of each photograph that was left out.
        skipped_indices: Their numbers in the whole list.
        pictures: Photographs for display, uint8 (height, width, channel), by their numbers in the whole list.
    """

    position: int = 0
    names: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    skipped_indices: list[int] = field(default_factory=list)
    pictures: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> ImageManifest:
        """What `state` was taken of, but for the pictures."""
        return cls(
            position=state["position"],
            names=list(state["names"]),
            indices=list(state["indices"]),
            digests=list(state["digests"]),
            skipped=[(name, reason) for name, reason in state["skipped"]],
            skipped_indices=list(state["skipped_indices"]),
        )

    def state(self) -> dict[str, Any]:
        """All but the pictures, as JSON can hold it."""
        return {name: copy(value) for name, value in vars(self).items() if name != "pictures"}

    def add(self, later: ImageManifest) -> None:
        """Appends what came later."""
        self.position = later.position
        self.names += later.names
        self.indices += later.indices
        self.digests += later.digests
        self.skipped += later.skipped
        self.skipped_indices += later.skipped_indices
        self.pictures |= later.pictures

    def in_order(self) -> tuple[ImageManifest, list[int]]:
        """The same in the order of the whole list, and where each of its images was."""
        order, skipped = _ascending(self.indices), _ascending(self.skipped_indices)
        ordered = ImageManifest(
            position=self.position,
            names=[self.names[where] for where in order],
            indices=[self.indices[where] for where in order],
            digests=[self.digests[where] for where in order],
            skipped=[self.skipped[where] for where in skipped],
            skipped_indices=[self.skipped_indices[where] for where in skipped],
            pictures=self.pictures,
        )
        return ordered, order

    def shown(self, count: int) -> np.ndarray | None:
        """The photographs of the first `count` images (image, height, width, channel); None if they were not kept."""
        first = self.indices[:count]
        return np.stack([self.pictures[index] for index in first]) if first and self.pictures.keys() >= set(first) else None

    def keep_pictures(self, count: int) -> None:
        """Forgets all photographs but those of the first `count` images."""
        first = set(self.indices[:count])
        self.pictures = {index: picture for index, picture in self.pictures.items() if index in first}

    def check_any(self) -> None:
        """Raise InputError if all images that there were are left out."""
        if self.skipped and not self.names:
            name, reason = self.skipped[0]
            raise InputError(f"none of the {len(self.skipped)} images can be read; the first, {name}: {reason}")

    def provenance(self) -> dict[str, Any]:
        """Number, names and hash of the images, and why others were left out."""
        skipped: dict[str, str] = {}
        times = Counter[str]()
        for name, reason in self.skipped:
            times[name] += 1
            skipped[name if times[name] == 1 else f"{name} ({times[name]})"] = reason
        digest = hashlib.sha256("".join(self.digests).encode()).hexdigest()
        return {"count": len(self.names), "names": self.names, "sha256": digest, "skipped": skipped}


def _ascending(numbers: Sequence[int]) -> list[int]:
    """Where the smallest number is, and then each next one."""
    return sorted(range(len(numbers)), key=numbers.__getitem__)
