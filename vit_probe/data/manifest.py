"""Record of a pass over images: names, hashes, skipped images, and photographs kept for display."""

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
    """Record of the images that a stream has yielded and skipped so far.

    Args:
        position: Index in the whole list of the first image that has not been reached.
        names: Names of the images that were yielded.
        indices: Their indices in the whole list, from 0.
        digests: Hashes of their pixels.
        skipped: Name of each skipped image, and why it was skipped.
        skipped_indices: Indices of the skipped images in the whole list.
        pictures: Photographs for display, uint8 (height, width, channel), by index in the whole list.
        contents: Hashes of what the source gave for the images that were yielded (see `content_digest`), by which a resumed run
            tells whether they are still the same.

    Examples:
        >>> first = ImageManifest(3, names=["a.jpg", "c.jpg"], indices=[0, 2], digests=["1f", "2e"])
        >>> second = ImageManifest(4, names=["b.jpg"], indices=[1], digests=["3d"])
        >>> second.skipped, second.skipped_indices = [("d.jpg", "truncated")], [3]
        >>> first.extend(second)
        >>> ordered, order = first.in_order()
        >>> ordered.names, order
        (['a.jpg', 'b.jpg', 'c.jpg'], [0, 2, 1])
        >>> ordered.provenance()["skipped"]
        {'d.jpg': 'truncated'}
    """

    position: int = 0
    names: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    skipped_indices: list[int] = field(default_factory=list)
    pictures: dict[int, np.ndarray] = field(default_factory=dict)
    contents: list[str] = field(default_factory=list)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ImageManifest:
        """Restore a manifest, without its pictures, from its `state`."""
        manifest = cls(
            position=state["position"],
            names=list(state["names"]),
            indices=list(state["indices"]),
            digests=list(state["digests"]),
            skipped=[(name, reason) for name, reason in state["skipped"]],
            skipped_indices=list(state["skipped_indices"]),
            contents=list(state["contents"]),
        )
        if not all(isinstance(index, int) for index in (manifest.position, *manifest.indices, *manifest.skipped_indices)):
            raise InputError("the state does not number its images")
        if not len(manifest.names) == len(manifest.indices) == len(manifest.digests) == len(manifest.contents):
            raise InputError("the state does not hold a name, an index and two hashes of each image")
        return manifest

    def state(self) -> dict[str, Any]:
        """A copy of everything but the pictures, in types that JSON can represent."""
        return {name: copy(value) for name, value in vars(self).items() if name != "pictures"}

    def append(self, index: int, name: str, digest: str, content: str) -> None:
        """Record an image, with the hashes of its pixels and of what its source gave."""
        self.position = index + 1
        self.indices.append(index)
        self.names.append(name)
        self.digests.append(digest)
        self.contents.append(content)

    def extend(self, later: ImageManifest) -> None:
        """Append a manifest of later images."""
        self.position = later.position
        self.names += later.names
        self.indices += later.indices
        self.digests += later.digests
        self.skipped += later.skipped
        self.skipped_indices += later.skipped_indices
        self.pictures |= later.pictures
        self.contents += later.contents

    def in_order(self) -> tuple[ImageManifest, list[int]]:
        """The manifest sorted by index in the whole list, and for each of its images the place where it was before.

        It is that of a complete run, which is not resumed, and therefore has no `contents`.
        """
        order, skipped_order = _argsort(self.indices), _argsort(self.skipped_indices)
        ordered = ImageManifest(
            position=self.position,
            names=[self.names[place] for place in order],
            indices=[self.indices[place] for place in order],
            digests=[self.digests[place] for place in order],
            skipped=[self.skipped[place] for place in skipped_order],
            skipped_indices=[self.skipped_indices[place] for place in skipped_order],
            pictures=self.pictures,
        )
        return ordered, order

    def first_pictures(self, count: int) -> np.ndarray | None:
        """The pictures of the first `count` images (image, height, width, channel); None if any of them was not kept."""
        first = self.indices[:count]
        return np.stack([self.pictures[index] for index in first]) if first and self.pictures.keys() >= set(first) else None

    def drop_pictures_after(self, count: int) -> None:
        """Drop all pictures but those of the first `count` images."""
        first = set(self.indices[:count])
        self.pictures = {index: picture for index, picture in self.pictures.items() if index in first}

    def check_not_all_skipped(self) -> None:
        """Raise InputError if there were images and all of them were skipped."""
        if self.skipped and not self.names:
            name, reason = self.skipped[0]
            raise InputError(f"none of the {len(self.skipped)} images can be read; the first, {name}: {reason}")

    def provenance(self) -> dict[str, Any]:
        """Count, names and combined hash of the images, and why others were skipped."""
        skipped: dict[str, str] = {}
        occurrences = Counter[str]()
        for name, reason in self.skipped:
            occurrences[name] += 1
            skipped[name if occurrences[name] == 1 else f"{name} ({occurrences[name]})"] = reason
        digest = hashlib.sha256("".join(self.digests).encode()).hexdigest()
        return {"count": len(self.names), "names": self.names, "sha256": digest, "skipped": skipped}


def _argsort(numbers: Sequence[int]) -> list[int]:
    return sorted(range(len(numbers)), key=numbers.__getitem__)
