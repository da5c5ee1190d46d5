"""Photographs, files, datasets or tensors as a stream of batches for a model."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from threading import Event
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vit_probe.data.manifest import ImageManifest
from vit_probe.data.prefetch import parallel_map, prefetch
from vit_probe.data.preprocessing import Preprocessing, check_image, decode_image, decoding, read_image
from vit_probe.data.samples import Sample
from vit_probe.data.sources import Batches, IndexedImages, Share, open_source
from vit_probe.errors import InputError

__all__ = ["ImageStream", "Images"]

Images = Tensor | str | Path | Iterable[Any]
"""A preprocessed tensor (batch, channel, height, width); a photograph, file, folder or pattern (`photos/**/*.jpg`), or a
sequence of these; a dataset of torch or Hugging Face, or any sequence or iterable, of photographs, files or preprocessed
tensors (channel, height, width); or any iterable of preprocessed batches. Of a tuple the first entry is taken, as from a
labelled dataset, of a dictionary `image` (or `img`, `pixel_values`)."""

_AHEAD = 2  # batches


class ImageStream:
    """Batches of preprocessed images from whatever the user gave, with names and a hash for provenance.

    Photographs are read, decoded and prepared by a few threads, at most two batches ahead of whoever takes the batches.
    Datasets and iterables of images are asked for one image at a time, in order, by one thread. Iterables of batches are
    sample when a batch is needed, by whoever takes it: a `DataLoader` has workers of its own.

    Args:
        images: See `Images`. Their order is taken to be the same each time.
        preprocessing: Needed for photographs and files; tensors are taken as they are.
        batch_size: Images a batch, where this class forms the batches.
        keep: Of how many images, from the first, the photographs are kept for display, as the model saw them.
        on_error: What becomes of a photograph that cannot be read: `stop` raises, `skip` leaves it out and lists it.
        start: How many images to pass over at the start, without decoding them. Those of an iterable are sample and dropped.
        shard: (rank, processes): only images whose index in the whole list leaves `rank` when divided by `processes`.

    Attributes:
        image_size: Height and width in pixels of what the model sees.
        count: Images that there are to go through, broken ones included, after `start` and `shard`; None if not known.
        names: Of the images that the last iteration has given so far.
        indices: Their numbers in the whole list, from 0.
        skipped: Name and reason of each photograph that it has left out.
        position: How many images of the whole list it is past: the `start` with which another stream goes on after the
            batch given last.

    Raises:
        InputError: If the images are of no known kind, there are none, or, with `stop`, a file is missing or, as far as
            its header and checksums tell, cannot be read. What only decoding shows comes up in its place.
    """

    def __init__(
        self,
        images: Images,
        preprocessing: Preprocessing | None,
        *,
        batch_size: int = 16,
        keep: int = 0,
        on_error: Literal["stop", "skip"] = "stop",
        start: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if on_error not in ("stop", "skip"):
            raise InputError(f"on_error must be 'stop' or 'skip', got {on_error!r}")
        self.preprocessing, self.batch_size, self.on_error = preprocessing, batch_size, on_error
        self._share = Share(start, *shard)
        self._keep = keep
        self._done: Mapping[str, Any] | None = None
        self._manifest = ImageManifest(position=start)
        self._source = open_source(images, batch_size)
        total, first = self._source.total, self._source.first
        if total is not None and start > total:
            raise InputError(f"start is {start}, but there are {total} images")
        self.count = None if total is None else len(self._share.indices(total))
        if isinstance(first, Tensor):
            height, width = first.shape[-2:]
            self.image_size = (height, width)
        elif preprocessing is None:
            raise InputError(
                "this model does not say how photographs are prepared for it; pass preprocessing=Preprocessing(...) or tensors"
            )
        else:
            self.image_size = preprocessing.size
        if on_error == "stop" and isinstance(self._source, IndexedImages):
            for _ in parallel_map(check_image, self._source.files(self._share)):
                pass

    def identity(self) -> str:
        """A hash of the whole list of images, made without decoding any, that tells it from other lists.

        Of files it takes paths as given and sizes; of tensors, and photographs in memory, the numbers; of datasets and
        iterables their class, their length if they have one, and kind and shape of the first image.
        """
        return self._identity

    @cached_property
    def _identity(self) -> str:
        return self._source.identity()

    def __iter__(self) -> Iterator[Float[Tensor, "batch channel height width"]]:
        """Goes through the images; for an iterator, such as a generator, once only."""
        done, self._done = self._done, None
        self._manifest = ImageManifest(position=self._share.start) if done is None else ImageManifest.restored(done)
        if done is not None:
            self._keep_again()
        with closing(self._given() if isinstance(self._source, Batches) else self._prepared()) as batches:
            for images, record in batches:
                wanted = max(self._keep - len(self.names), 0)
                if self.preprocessing is not None and images is not None and wanted:
                    pictures = self.preprocessing.denormalize(images[:wanted])
                    record.pictures = dict(zip(record.indices, pictures, strict=False))
                self._manifest.add(record)
                if images is not None:
                    yield images
        if self._share == Share():
            self._manifest.check_any()

    @property
    def names(self) -> list[str]:
        return self._manifest.names

    @property
    def indices(self) -> list[int]:
        return self._manifest.indices

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return self._manifest.skipped

    @property
    def position(self) -> int:
        return self._manifest.position

    def kept(self) -> np.ndarray | None:
        """The photographs kept for display, uint8 (image, height, width, channel).

        None where no preprocessing is known, or the images came before a state that `resume` took and cannot be had again.
        """
        return self._manifest.shown(self._keep)

    def provenance(self) -> dict[str, Any]:
        """Number, names and hash of the images that the last iteration went through, and why others were left out."""
        return self._manifest.provenance()

    def state(self) -> dict[str, Any]:
        """What `resume` needs to go on after the batch given last."""
        return self._manifest.state()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Has the next iteration begin where `state` was taken, of a stream of the same images, with what came before."""
        self._done = state

    def record(self) -> ImageManifest:
        """What the last iteration went through, for `merge`."""
        return self._manifest

    def merge(self, records: Sequence[ImageManifest]) -> list[int]:
        """Makes what the streams of all shards went through that of this one, in the order of the whole list.

        Args:
            records: Of all shards, this one included.

        Returns:
            For each image, its place among those of the first shard, followed by those of the second and so on.

        Raises:
            InputError: If there were images, and none could be read.
        """
        together = ImageManifest()
        for record in records:
            together.add(record)
        together.position = max(record.position for record in records)
        self._manifest, order = together.in_order()
        self._manifest.keep_pictures(self._keep)
        self._manifest.check_any()
        return order

    def _keep_again(self) -> None:
        """Prepares the photographs once more that are kept for display and that an earlier run went through."""
        if self.preprocessing is None or not isinstance(self._source, IndexedImages):
            return
        wanted = set(self.indices[: self._keep])
        for sample in self._source.draw(self._share):
            if sample.index > max(wanted, default=-1):
                break
            if sample.index in wanted and (image := self._prepare(sample).image) is not None:
                (self._manifest.pictures[sample.index],) = self.preprocessing.denormalize(image[None])

    def _given(self) -> Generator[_Batch, None, None]:
        """Batches that were given as such."""
        assert isinstance(self._source, Batches)
        for indices, images in self._source.draw(replace(self._share, start=self.position)):
            self._check_size(images)
            digests = [hashlib.sha256(_numbers(image)).hexdigest() for image in images]
            yield _Batch(
                images, ImageManifest(indices[-1] + 1, [f"image {index}" for index in indices], list(indices), digests)
            )

    def _prepared(self) -> Generator[_Batch, None, None]:
        """Batches of images, prepared ahead."""
        assert not isinstance(self._source, Batches)
        stopped = Event()
        sample = takewhile(lambda _: not stopped.is_set(), self._source.draw(replace(self._share, start=self.position)))
        return prefetch(self._batched(parallel_map(self._prepare, sample)), _AHEAD, stopped)

    def _prepare(self, sample: Sample) -> _Prepared:
        """What a worker does for one image."""
        item = sample.item
        try:
            if isinstance(item, InputError):
                raise item
            if isinstance(item, Tensor):
                return _Prepared(sample, item, hashlib.sha256(_numbers(item)).hexdigest())
            if not isinstance(item, Image.Image):
                item = decode_image(item, sample.name) if isinstance(item, bytes) else read_image(item)
            assert self.preprocessing is not None
            with decoding(sample.name):
                return _Prepared(sample, self.preprocessing(item), hashlib.sha256(item.tobytes()).hexdigest())
        except InputError as error:
            if self.on_error == "stop":
                raise
            return _Prepared(sample, reason=str(error))

    def _batched(self, prepared: Generator[_Prepared, None, None]) -> Generator[_Batch, None, None]:
        """Gathers images into batches."""
        record, images = ImageManifest(), list[Tensor]()
        with closing(prepared):
            for one in prepared:
                record.position = one.sample.index + 1
                if one.image is None:
                    record.skipped.append((one.sample.name, one.reason))
                    record.skipped_indices.append(one.sample.index)
                    continue
                self._check_size(one.image)
                images.append(one.image)
                record.names.append(one.sample.name)
                record.indices.append(one.sample.index)
                record.digests.append(one.digest)
                if len(images) == self.batch_size:
                    yield _Batch(_stacked(images), record)
                    record, images = ImageManifest(), []
        if images or record.skipped:
            yield _Batch(_stacked(images) if images else None, record)

    def _check_size(self, images: Tensor) -> None:
        height, width = images.shape[-2:]
        if (height, width) != self.image_size:
            raise InputError(
                f"images of {height} x {width} pixels follow ones of {self.image_size[0]} x {self.image_size[1]}; measure one "
                "size at a time"
            )


@dataclass
class _Prepared:
    """An image as the model takes it, with the hash of its pixels; or why there is none."""

    sample: Sample
    image: Tensor | None = None
    digest: str = ""
    reason: str = ""


class _Batch(NamedTuple):
    """Images, None where all that was left was broken; and what was gone through since the batch before."""

    images: Tensor | None
    record: ImageManifest


def _numbers(images: Tensor) -> Any:
    return images.detach().cpu().contiguous().view(torch.uint8).numpy().data


def _stacked(images: list[Tensor]) -> Float[Tensor, "batch channel height width"]:
    """The images as one tensor; by NumPy where it can, as torch would start threads of its own in this one."""
    if all(image.dtype == torch.float32 and image.device.type == "cpu" for image in images):
        return torch.from_numpy(np.stack([image.detach().numpy() for image in images]))
    return torch.stack(images)
