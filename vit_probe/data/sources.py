"""Where images come from: photographs, files, tensors, datasets, and iterables of images or of batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from vit_probe.data.preprocessing import UNREADABLE, expand_source
from vit_probe.data.samples import Sample, checked_batch, content, image_of, is_batch, kind_and_shape, to_sample
from vit_probe.errors import InputError

__all__ = ["Batches", "IndexedImages", "IteratedImages", "Share", "Source", "open_source"]

_NONE = "there are no images; pass at least one"


@dataclass(frozen=True)
class Share:
    """Which of the images are gone through: from `start`, those whose index leaves `rank` when divided by `processes`."""

    start: int = 0
    rank: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if self.start < 0:
            raise InputError(f"start must be at least 0, got {self.start}")
        if not 0 <= self.rank < self.processes:
            raise InputError(f"shard must be (rank, processes) with 0 <= rank < processes, got {(self.rank, self.processes)}")

    def indices(self, total: int) -> range:
        """The indices of the images of this share, of `total`."""
        return range(self.start + (self.rank - self.start) % self.processes, total, self.processes)

    def __contains__(self, index: int) -> bool:
        return index >= self.start and index % self.processes == self.rank


class IndexedImages:
    """Images that can be asked for by their number: a list, a `torch.utils.data.Dataset`, a `datasets.Dataset`."""

    def __init__(self, items: Any, first: Any) -> None:
        self.items, self.total, self.first = items, len(items), image_of(first)

    def draw(self, share: Share) -> Iterator[Sample]:
        """The images of the share, one at a time; no others are asked for."""
        for index in share.indices(self.total):
            try:
                item = self.items[index]
            except UNREADABLE as error:
                failure = InputError(f"{type(self.items).__name__} cannot read its image {index} ({error})")
                failure.__cause__ = error
                yield Sample(index, f"image {index}", failure)
            else:
                yield to_sample(index, item)

    def files(self, share: Share) -> Iterator[str | Path]:
        """The files of the share, which can be looked at before they are decoded."""
        if isinstance(self.items, list | tuple):
            chosen = (self.items[index] for index in share.indices(self.total))
            yield from (item for item in chosen if isinstance(item, str | Path))

    def identity(self) -> str:
        """See `ImageStream.identity`."""
        if isinstance(self.items, list | tuple):
            return _hashed(chain.from_iterable(content(item) for item in self.items))
        return _hashed([type(self.items).__name__, self.total, *kind_and_shape(self.first)])


class IteratedImages:
    """Images that come one after the other, as of an `IterableDataset` or a streamed `datasets.IterableDataset`."""

    total: int | None = None

    def __init__(self, items: Iterable[Any], first: Any, rest: Iterator[Any]) -> None:
        self.items, self.first = items, image_of(first)
        self._once: Iterator[Any] | None = chain([first], rest)

    def draw(self, share: Share) -> Iterator[Sample]:
        """The images of the share; the others are drawn and dropped."""
        items, self._once = self._once or iter(self.items), None
        yield from (to_sample(index, item) for index, item in enumerate(items) if index in share)

    def identity(self) -> str:
        """See `ImageStream.identity`."""
        return _hashed([type(self.items).__name__, *kind_and_shape(self.first)])


class Batches:
    """Batches of images, prepared already: one tensor, or an iterable such as a `DataLoader`."""

    def __init__(self, items: Any, first: Any, rest: Iterator[Any], batch_size: int) -> None:
        self.items, self._batch_size = items, batch_size
        self.total = len(items) if isinstance(items, Tensor) else None
        self.first = checked_batch(first)
        self._once: Iterator[Any] | None = chain([first], rest)

    def draw(self, share: Share) -> Iterator[tuple[range, Tensor]]:
        """The images of the share, and their indices; batches without any are dropped."""
        if isinstance(self.items, Tensor):
            indices = share.indices(len(self.items))
            for start in range(0, len(indices), self._batch_size):
                chosen = indices[start : start + self._batch_size]
                yield chosen, self.items[chosen.start : chosen.stop : chosen.step]
            return
        items, self._once = self._once or _in_order(self.items), None
        before = 0
        for batch in map(checked_batch, items):
            left = Share(max(share.start - before, 0), (share.rank - before) % share.processes, share.processes)
            chosen, after = left.indices(len(batch)), before + len(batch)
            if chosen:
                yield range(before + chosen.start, after, chosen.step), batch[chosen.start :: chosen.step]
            before = after

    def identity(self) -> str:
        """See `ImageStream.identity`."""
        if isinstance(self.items, Tensor | list | tuple):
            items = [self.items] if isinstance(self.items, Tensor) else self.items
            return _hashed(chain.from_iterable(content(item) for item in items))
        length = len(self.items) if hasattr(self.items, "__len__") else None
        return _hashed([type(self.items).__name__, length, *kind_and_shape(self.first)])


Source = IndexedImages | IteratedImages | Batches


def open_source(images: Any, batch_size: int) -> Source:
    """What `images` are; see `vit_probe.data.stream.Images`.

    Raises:
        InputError: If they are of no known kind, or there are none.
    """
    if isinstance(images, str | Path):
        files = expand_source(images)
        if files == [Path(images)] and not files[0].is_file():
            raise InputError(f"there is no image file or folder {images}")
        return IndexedImages(files, files[0])
    if isinstance(images, Image.Image):
        return IndexedImages([images], images)
    if isinstance(images, Tensor):
        if not len(checked_batch(images)):
            raise InputError(_NONE)
        return Batches(images, images[:1], iter(()), batch_size)
    if isinstance(images, Mapping):
        raise InputError(f"images are a {type(images).__name__} of {sorted(map(str, images))}; pass one of these")
    if isinstance(images, Set):
        raise InputError(f"images are a {type(images).__name__}, which has no order; pass a list")
    if _has_indices(images):
        items, first = _in_order(images), _first_readable(images)
        if isinstance(images, list | tuple) and isinstance(first, str | Path | Image.Image):
            return _photographs(images)
        return Batches(images, next(items), items, batch_size) if is_batch(first) else IndexedImages(images, first)
    if not isinstance(images, Iterable):
        raise InputError(
            f"images must be a tensor, photographs, paths, a dataset or an iterable of batches, got {type(images).__name__}"
        )
    items = iter(images)
    first = _first(items)
    if isinstance(first, str | Path):
        return _photographs([first, *items])
    if is_batch(first):
        return Batches(images, first, items, batch_size)
    return IteratedImages(images, first, items)


def _has_indices(images: Any) -> bool:
    kinds = hasattr(images, "__getitem__") and hasattr(images, "__len__")
    return kinds and not isinstance(images, IterableDataset)  # which inherits a __getitem__ that only raises


def _in_order(items: Any) -> Iterator[Any]:
    return (items[index] for index in range(len(items))) if _has_indices(items) else iter(items)


def _first(items: Iterator[Any]) -> Any:
    for item in items:
        return item
    raise InputError(_NONE)


def _first_readable(items: Any) -> Any:
    """The first item that a dataset can give, which tells what it holds."""
    failure = InputError(_NONE)
    for index in range(len(items)):
        try:
            return items[index]
        except UNREADABLE as error:
            failure = InputError(f"{type(items).__name__} cannot read any of its {len(items)} images; the last: {error}")
    raise failure


def _photographs(items: Iterable[Any]) -> IndexedImages:
    """Photographs and paths, with folders and patterns replaced by what they hold."""
    found: list[Any] = []
    for item in items:
        if not isinstance(item, str | Path | Image.Image):
            raise InputError("a list of photographs must hold PIL images or paths only")
        found += [item] if isinstance(item, Image.Image) else expand_source(item)
    return IndexedImages(found, found[0])


def _hashed(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        data = value if isinstance(value, bytes) else str(value).encode()
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()
