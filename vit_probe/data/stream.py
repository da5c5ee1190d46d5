"""Photographs, files, datasets or tensors as a stream of batches for a model."""

from __future__ import annotations

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

from vit_probe.data.image_files import check_image, decode_image, decoding, read_image
from vit_probe.data.manifest import ImageManifest
from vit_probe.data.prefetch import parallel_map, prefetch
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.data.samples import Sample, content_digest, is_finite
from vit_probe.data.sources import BatchedImages, IndexedImages, Shard, open_source
from vit_probe.errors import InputError

__all__ = ["ImageStream", "Images"]

Images = Tensor | str | Path | Iterable[Any]
"""Any of:

- a preprocessed tensor (batch, channel, height, width);
- a photograph, a file, a folder, a pattern such as `photos/**/*.jpg`, or a sequence of these;
- a dataset of torch or Hugging Face, or any sequence or iterable, of photographs, files or preprocessed tensors (channel,
  height, width);
- an iterable of preprocessed batches, such as a `DataLoader`.

The first entry of a tuple is taken as the image, as in a labelled dataset; of a dictionary, the entry `image`, `img` or
`pixel_values`."""

_PREFETCHED_BATCHES = 2
_START_AGAIN = "pass the images that the run was started with, or omit --resume to start again"
_CHECKED_ITEMS = 32  # of a dataset whose items may be costly to read, when a run is resumed


class ImageStream:
    """Batches of preprocessed images from any source of images, with a record of their names and hashes.

    A few threads read, decode and preprocess photographs, at most two batches ahead of their use. Datasets and iterables of
    images are read by one thread, one image at a time and in order. Iterables of batches are read in the thread that uses
    the batches, when it needs one: a `DataLoader` has workers of its own.

    Args:
        images: See `Images`. Their order must be the same each time.
        preprocessing: Required for photographs and files; tensors are used unchanged.
        batch_size: Images per batch. Batches that are given as such keep their size.
        keep: Keep the photographs of the first `keep` images for display, as the model saw them.
        on_error: `stop` raises for a photograph that cannot be read, `skip` leaves it out and lists it.
        start: Number of images to skip at the start, without decoding them. An iterable is read up to there.
        shard: (rank, processes): yield only images whose index in the whole list leaves remainder `rank` when divided by
            `processes`.

    Attributes:
        image_size: Height and width in pixels of the images that the model sees.
        num_channels: Number of their channels.
        count: Number of images that an iteration goes through after `start` and `shard`, unreadable ones included; None if
            unknown.
        manifest: Record of the last iteration so far.
        names: Names of the images that it has yielded.
        indices: Their indices in the whole list, from 0.
        skipped: Name of each skipped photograph, and why it was skipped.
        position: The `start` with which another stream continues after the last batch.

    Raises:
        InputError: If the images are of no supported kind, there are none, or, with `stop`, a file is missing or its header
            or checksum shows that it is not readable. What only decoding shows, and tensors that hold NaN or infinite values,
            are raised when the image is reached.

    Examples:
        >>> from vit_probe import sample_photographs
        >>> stream = ImageStream(sample_photographs(3), Preprocessing(size=(32, 32), resize=36), batch_size=2)
        >>> [tuple(batch.shape) for batch in stream]
        [(2, 3, 32, 32), (1, 3, 32, 32)]
        >>> stream.names
        ['china', 'flower', 'grace_hopper']
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
        self._shard = Shard(start, *shard)
        self._keep = keep
        self._resume_state: Mapping[str, Any] | None = None
        self._measured: dict[int, str] = {}  # hash by index of the images before a resumed state that were not yet checked
        self.manifest = ImageManifest(position=start)
        self._source = open_source(images, batch_size)
        total, first = self._source.total, self._source.first
        if total is not None and start > total:
            raise InputError(f"start is {start}, but there are only {total} images")
        self.count = None if total is None else len(self._shard.indices(total))
        if isinstance(first, Tensor):
            self.num_channels, height, width = first.shape[-3:]
            self.image_size = (height, width)
        elif preprocessing is None:
            raise InputError(
                "this model does not define how photographs are preprocessed; pass preprocessing=Preprocessing(...), or tensors"
            )
        else:
            self.num_channels, self.image_size = len(preprocessing.mean), preprocessing.size
        if on_error == "stop" and isinstance(self._source, IndexedImages):
            # A missing or broken file is better reported now than hours into a run.
            for _ in parallel_map(check_image, self._source.files(self._shard)):
                pass

    def identity(self) -> str:
        """A hash that identifies the whole list of images, computed without decoding any.

        It covers names and sizes of files; the values of tensors and of photographs in memory; and, of datasets and iterables,
        their class, their length if they have one, and type and shape of the first image. Images whose content was replaced
        by another of the same size are noticed later, by `resume`.
        """
        return self._identity

    @cached_property
    def _identity(self) -> str:
        return self._source.identity()

    def __iter__(self) -> Iterator[Float[Tensor, "batch channel height width"]]:
        """Yield the batches; an iterator, such as a generator, can be used for one iteration only."""
        state, self._resume_state = self._resume_state, None
        self.manifest = ImageManifest(position=self._shard.start) if state is None else ImageManifest.from_state(state)
        self._measured = dict(zip(self.manifest.indices, self.manifest.contents, strict=True))
        if state is not None and isinstance(self._source, IndexedImages):
            step = 1 if self._source.is_list else -(-len(self.indices) // _CHECKED_ITEMS) or 1
            for _ in parallel_map(self._check_unchanged, self._source.samples_at(self.indices[::step])):
                pass
            self._measured = {}
            self._restore_pictures()
        with closing(
            self._given_batches() if isinstance(self._source, BatchedImages) else self._prefetched_batches()
        ) as batches:
            for images, manifest in batches:
                missing = max(self._keep - len(self.names), 0)
                if self.preprocessing is not None and images is not None and images.shape[1] == 3 and missing:
                    pictures = self.preprocessing.denormalize(images[:missing])
                    manifest.pictures = dict(zip(manifest.indices, pictures, strict=False))
                self.manifest.extend(manifest)
                if images is not None:
                    yield images
        if self._measured:
            raise InputError(f"there are fewer images than before the interruption; {_START_AGAIN}")
        if self._shard == Shard():  # the images of one shard may all be unreadable as long as another shard has some
            self.manifest.check_not_all_skipped()

    @property
    def names(self) -> list[str]:
        return self.manifest.names

    @property
    def indices(self) -> list[int]:
        return self.manifest.indices

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return self.manifest.skipped

    @property
    def position(self) -> int:
        return self.manifest.position

    def kept(self) -> np.ndarray | None:
        """The photographs kept for display, uint8 (image, height, width, channel).

        None if there is no preprocessing to undo, or if the images came before the state given to `resume` and cannot be
        read again.
        """
        return self.manifest.first_pictures(self._keep)

    def provenance(self) -> dict[str, Any]:
        """Count, names and hash of the images that the last iteration yielded, and why others were skipped."""
        return self.manifest.provenance()

    def state(self) -> dict[str, Any]:
        """The state from which `resume` continues after the last batch."""
        return self.manifest.state()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Make the next iteration continue from the `state` of a stream of the same images, and include its record.

        That iteration first compares hashes of the images before the state, and raises InputError unless they are those that
        the state's record is of: of all files, photographs and tensors in a list, of everything that comes as an iterable,
        which is read up to there in any case, and of up to 32 evenly spaced items of a dataset.
        """
        self._resume_state = state

    def merge(self, manifests: Sequence[ImageManifest]) -> list[int]:
        """Replace the manifest by those of all shards together, in the order of the whole list.

        Args:
            manifests: Those of all shards, this one included.

        Returns:
            For each image, its place among the images of the first shard, followed by those of the second and so on.

        Raises:
            InputError: If there were images, and none could be read.
        """
        merged = ImageManifest()
        for manifest in manifests:
            merged.extend(manifest)
        merged.position = max(manifest.position for manifest in manifests)
        self.manifest, order = merged.in_order()
        self.manifest.drop_pictures_after(self._keep)
        self.manifest.check_not_all_skipped()
        return order

    def _restore_pictures(self) -> None:
        """Prepare once more the photographs that are kept for display and that came before the resumed state."""
        assert isinstance(self._source, IndexedImages)
        if self.preprocessing is None:
            return
        for sample in self._source.samples_at(self.indices[: self._keep]):
            if (image := self._prepare(sample).image) is not None:
                (self.manifest.pictures[sample.index],) = self.preprocessing.denormalize(image[None])

    def _check_unchanged(self, sample: Sample) -> None:
        """Raise InputError unless the image is the one that was measured before the interruption, or was skipped then."""
        measured = self._measured.pop(sample.index, None)
        if measured is None:
            return
        if isinstance(sample.item, InputError):
            raise sample.item
        if content_digest(sample.item) != measured:
            raise InputError(f"{sample.name} has changed since it was measured before the interruption; {_START_AGAIN}")

    def _given_batches(self) -> Generator[_Batch, None, None]:
        """Batches that were given as such."""
        assert isinstance(self._source, BatchedImages)
        start = self.position
        for indices, images in self._source.batches(self._shard):
            samples = [Sample(index, f"image {index}", image) for index, image in zip(indices, images, strict=True)]
            for sample in samples:
                if sample.index < start:
                    self._check_unchanged(sample)
            left = [sample for sample in samples if sample.index >= start]
            if not left:
                continue
            images = images[-len(left) :]
            self._check_shape(images[0])
            manifest = ImageManifest()
            for sample, image in zip(left, images, strict=True):
                if not is_finite(image):
                    raise InputError(f"{sample.name} holds NaN or infinite values")
                digest = content_digest(image)
                manifest.append(sample.index, sample.name, digest, digest)
            yield _Batch(images, manifest)

    def _prefetched_batches(self) -> Generator[_Batch, None, None]:
        """Batches of single images, prepared ahead of their use."""
        assert not isinstance(self._source, BatchedImages)
        stopped = Event()
        samples = self._samples_from(self.position)
        # Checked for each image, so that leaving the iteration early does not wait for the rest of a batch.
        samples = takewhile(lambda _: not stopped.is_set(), samples)
        return prefetch(self._collect_batches(parallel_map(self._prepare, samples)), _PREFETCHED_BATCHES, stopped)

    def _samples_from(self, start: int) -> Iterator[Sample]:
        """The images from index `start` on. An iterable is read up to there, and those images are compared with the state."""
        if isinstance(self._source, IndexedImages):
            yield from self._source.samples(replace(self._shard, start=start))
            return
        assert not isinstance(self._source, BatchedImages)
        for sample in self._source.samples(self._shard):
            if sample.index < start:
                self._check_unchanged(sample)
            else:
                yield sample

    def _prepare(self, sample: Sample) -> _PreparedImage:
        """Read, decode, hash and preprocess one image, in a worker thread."""
        item = sample.item
        try:
            if isinstance(item, InputError):
                raise item
            content = content_digest(item)
            if isinstance(item, Tensor):
                return _PreparedImage(sample, item, content, content)
            if not isinstance(item, Image.Image):
                item = decode_image(item, sample.name) if isinstance(item, bytes) else read_image(item)
            return _PreparedImage(sample, self._preprocess(item, sample.name), content_digest(item), content)
        except InputError as error:
            if self.on_error == "stop":
                raise
            return _PreparedImage(sample, reason=str(error))

    def _preprocess(self, photograph: Image.Image, name: str) -> Tensor:
        assert self.preprocessing is not None
        with decoding(name):
            try:
                return self.preprocessing(photograph)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None

    def _collect_batches(self, prepared: Generator[_PreparedImage, None, None]) -> Generator[_Batch, None, None]:
        manifest, images = ImageManifest(), list[Tensor]()
        with closing(prepared):
            for one in prepared:
                if one.image is None:
                    manifest.position = one.sample.index + 1
                    manifest.skipped.append((one.sample.name, one.reason))
                    manifest.skipped_indices.append(one.sample.index)
                    continue
                self._check_shape(one.image)
                images.append(one.image)
                manifest.append(one.sample.index, one.sample.name, one.digest, one.content)
                if len(images) == self.batch_size:
                    yield _Batch(_stack(images), manifest)
                    manifest, images = ImageManifest(), []
        if images or manifest.skipped:
            yield _Batch(_stack(images) if images else None, manifest)

    def _check_shape(self, image: Tensor) -> None:
        channels, height, width = image.shape
        if (height, width) != self.image_size:
            raise InputError(
                f"all images must have the same size, got {height} x {width} pixels after "
                f"{self.image_size[0]} x {self.image_size[1]}; resize them, or measure one size at a time"
            )
        if channels != self.num_channels:
            raise InputError(f"all images must have the same channels, got {channels} after {self.num_channels}")


@dataclass
class _PreparedImage:
    """A preprocessed image with the hashes of its pixels and of what the source gave, or why it was skipped."""

    sample: Sample
    image: Tensor | None = None
    digest: str = ""
    content: str = ""
    reason: str = ""


class _Batch(NamedTuple):
    """Images, or None if all that remained were skipped; and the record of what came since the batch before."""

    images: Tensor | None
    manifest: ImageManifest


def _stack(images: list[Tensor]) -> Float[Tensor, "batch channel height width"]:
    """Stack images; in NumPy where possible, because torch would start its own thread pool in the prefetching thread."""
    if all(image.dtype == torch.float32 and image.device.type == "cpu" for image in images):
        return torch.from_numpy(np.stack([image.detach().numpy() for image in images]))
    return torch.stack(images)
