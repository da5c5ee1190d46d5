"""Sources of images: photographs, files, tensors, datasets, and iterables of images or of batches."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from vit_probe.data.image_files import READ_ERRORS, expand_source, printable
from vit_probe.data.samples import Sample, checked_batch, fingerprint, image_of, is_batch, to_sample, type_and_shape
from vit_probe.errors import InputError

__all__ = ["BatchedImages", "IndexedImages", "IterableImages", "Shard", "Source", "open_source"]

_NO_IMAGES = "there are no images; pass at least one"


@dataclass(frozen=True)
class Shard:
    """A part of the list of images: from `start`, those whose index leaves remainder `rank` when divided by `processes`.

    Examples:
        >>> list(Shard(start=2, rank=0, processes=3).indices(10))
        [3, 6, 9]
    """

    start: int = 0
    rank: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if self.start < 0:
            raise InputError(f"start must be at least 0, got {self.start}")
        if not 0 <= self.rank < self.processes:
            raise InputError(f"shard must be (rank, processes) with 0 <= rank < processes, got {(self.rank, self.processes)}")

    def indices(self, total: int) -> range:
        """The indices of this shard's images in a list of `total` images."""
        return range(self.start + (self.rank - self.start) % self.processes, total, self.processes)

    def __contains__(self, index: int) -> bool:
        return index >= self.start and index % self.processes == self.rank


class IndexedImages:
    """Images with random access: a list, a `torch.utils.data.Dataset`, a `datasets.Dataset`."""

    def __init__(self, items: Any, first: Any) -> None:
        self.items, self.total, self.first = items, len(items), image_of(first)

    @property
    def is_list(self) -> bool:
        """Whether the images are a list of files, photographs or tensors, which costs little to go through once more."""
        return isinstance(self.items, list | tuple)

    def samples(self, shard: Shard) -> Iterator[Sample]:
        """Yield the images of a shard; no others are read."""
        return self.samples_at(shard.indices(self.total))

    def samples_at(self, indices: Iterable[int]) -> Iterator[Sample]:
        """Yield the images with these indices in the whole list."""
        for index in indices:
            try:
                item = self.items[index]
            except READ_ERRORS as error:
                failure = InputError(f"{type(self.items).__name__} cannot read its image {index} ({_reason(error)})")
                failure.__cause__ = error
                yield Sample(index, f"image {index}", failure)
            else:
                yield to_sample(index, item)

    def files(self, shard: Shard) -> Iterator[str | Path]:
        """Yield the files of a shard, which can be checked before they are decoded."""
        if self.is_list:
            shard_items = (self.items[index] for index in shard.indices(self.total))
            yield from (item for item in shard_items if isinstance(item, str | Path))

    def identity(self) -> str:
        """See `ImageStream.identity`."""
        if self.is_list:
            return _hash(chain.from_iterable(fingerprint(item) for item in self.items))
        return _hash([type(self.items).__name__, self.total, *type_and_shape(self.first)])


class IterableImages:
    """Images in sequence: an `IterableDataset`, a streamed `datasets.IterableDataset`, a generator."""

    total: int | None = None

    def __init__(self, items: Iterable[Any], first: Any, rest: Iterator[Any]) -> None:
        self.items, self.first = items, image_of(first)
        # The first pass reuses the iterator whose first item is taken already: a generator cannot be started again.
        self._first_pass: Iterator[Any] | None = chain([first], rest)

    def samples(self, shard: Shard) -> Iterator[Sample]:
        """Yield the images of a shard; the others are read and dropped."""
        items, self._first_pass = self._first_pass or iter(self.items), None
        yield from (to_sample(index, item) for index, item in enumerate(items) if index in shard)

    def identity(self) -> str:
        """See `ImageStream.identity`."""
        return _hash([type(self.items).__name__, *type_and_shape(self.first)])


class BatchedImages:
    """Preprocessed images that come in batches: one tensor, or an iterable such as a `DataLoader`."""

    def __init__(self, items: Any, first: Any, rest: Iterator[Any], batch_size: int) -> None:
        self.items, self._batch_size = items, batch_size
        self.total = len(items) if isinstance(items, Tensor) else None
        self.first = checked_batch(first)
        self._first_pass: Iterator[Any] | None = chain([first], rest)

    def batches(self, shard: Shard) -> Iterator[tuple[range, Tensor]]:
        """Yield the images of a shard and their indices, batch by batch; batches without any are dropped."""
        if isinstance(self.items, Tensor):
            indices = shard.indices(len(self.items))
            for start in range(0, len(indices), self._batch_size):
                chosen = indices[start : start + self._batch_size]
                yield chosen, self.items[chosen.start : chosen.stop : chosen.step]
            return
        items, self._first_pass = self._first_pass or _in_order(self.items), None
        offset = 0
        for batch in map(checked_batch, items):
            # The same shard, counted from the first image of this batch.
            within = Shard(max(shard.start - offset, 0), (shard.rank - offset) % shard.processes, shard.processes)
            chosen, end = within.indices(len(batch)), offset + len(batch)
            if chosen:
                yield range(offset + chosen.start, end, chosen.step), batch[chosen.start :: chosen.step]
            offset = end

    def identity(self) -> str:
        """See `ImageStream.identity`."""
        if isinstance(self.items, Tensor | list | tuple):
            items = [self.items] if isinstance(self.items, Tensor) else self.items
            return _hash(chain.from_iterable(fingerprint(item) for item in items))
        length = len(self.items) if hasattr(self.items, "__len__") else None
        return _hash([type(self.items).__name__, length, *type_and_shape(self.first)])


Source = IndexedImages | IterableImages | BatchedImages


def open_source(images: Any, batch_size: int) -> Source:
    """Find out what kind of images `images` are; see `vit_probe.data.stream.Images` for the kinds.

    Raises:
        InputError: If they are of no supported kind, or there are none.

    Examples:
        >>> import torch
        >>> source = open_source(torch.zeros(5, 3, 8, 8), batch_size=2)
        >>> [(list(indices), tuple(batch.shape)) for indices, batch in source.batches(Shard(start=2))]
        [([2, 3], (2, 3, 8, 8)), ([4], (1, 3, 8, 8))]
    """
    if isinstance(images, str | Path):
        files = expand_source(images)
        if files == [Path(images)] and not os.path.lexists(images):
            raise InputError(f"there is no image file or folder {printable(images)}")
        return IndexedImages(files, files[0])
    if isinstance(images, Image.Image):
        return IndexedImages([images], images)
    if isinstance(images, Tensor):
        if not len(checked_batch(images)):
            raise InputError(_NO_IMAGES)
        return BatchedImages(images, images[:1], iter(()), batch_size)
    if isinstance(images, Mapping):
        raise InputError(f"images are a {type(images).__name__} with keys {sorted(map(str, images))}; pass one of its values")
    if isinstance(images, Set):
        raise InputError(f"images are a {type(images).__name__}, which has no order; pass a list")
    if _has_random_access(images):
        items, first = _in_order(images), _first_readable(images)
        if isinstance(images, list | tuple) and isinstance(first, str | Path | Image.Image):
            return _photographs(images)
        return BatchedImages(images, next(items), items, batch_size) if is_batch(first) else IndexedImages(images, first)
    if not isinstance(images, Iterable):
        raise InputError(
            f"images must be a tensor, photographs, paths, a dataset or an iterable of batches, got {type(images).__name__}"
        )
    items = _in_order(images)
    first = _first(items)
    if isinstance(first, str | Path):
        return _photographs([first, *items])
    if is_batch(first):
        return BatchedImages(images, first, items, batch_size)
    return IterableImages(images, first, items)


def _has_random_access(images: Any) -> bool:
    sized = hasattr(images, "__getitem__") and hasattr(images, "__len__")
    return sized and not isinstance(images, IterableDataset)  # which inherits a __getitem__ that only raises


def _in_order(items: Any) -> Iterator[Any]:
    # By index where possible: map-style datasets of torch define no __iter__, and need not raise IndexError at their end.
    return (items[index] for index in range(len(items))) if _has_random_access(items) else _collated(items)


def _collated(items: Iterable[Any]) -> Iterator[Any]:
    """The items of an iterable, with a sentence where a `DataLoader` cannot put its dataset's images into batches."""
    try:
        yield from items
    except (RuntimeError, TypeError) as error:
        reason = re.search(r"default_collate: .*|stack expects each tensor .*", str(error))
        if reason is None:
            raise
        raise InputError(
            f"the images cannot be put into batches ({reason[0]}); pass the dataset itself, or images of one size as tensors"
        ) from error


def _first(items: Iterator[Any]) -> Any:
    for item in items:
        return item
    raise InputError(_NO_IMAGES)


def _first_readable(items: Any) -> Any:
    """The first item that a dataset can read, which shows what kind of images it holds."""
    failure = InputError(_NO_IMAGES)
    for index in range(len(items)):
        try:
            return items[index]
        except READ_ERRORS as error:
            reason = _reason(error)
            failure = InputError(f"{type(items).__name__} cannot read any of its {len(items)} images; the last: {reason}")
    raise failure


def _photographs(items: Iterable[Any]) -> IndexedImages:
    """Photographs and paths, with folders and patterns replaced by the files in them."""
    photographs: list[Any] = []
    for item in items:
        if not isinstance(item, str | Path | Image.Image):
            raise InputError(f"a list of photographs must contain only PIL images and paths, got {type(item).__name__}")
        photographs += [item] if isinstance(item, Image.Image) else expand_source(item)
    return IndexedImages(photographs, photographs[0])


def _reason(error: Exception) -> str:
    return printable(str(error) or type(error).__name__)


def _hash(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        data = value if isinstance(value, bytes) else str(value).encode(errors="backslashreplace")
        digest.update(f"{len(data)}:".encode() + data)  # with lengths, so that (ab, c) and (a, bc) differ
    return digest.hexdigest()
