"""Photographs, files or tensors as a stream of batches for a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vit_probe.errors import InputError
from vit_probe.images import Preprocessing, find_images, read_image

__all__ = ["ImageStream", "Images"]

Images = Tensor | str | Path | Iterable[Any]
"""A preprocessed tensor (batch, channel, height, width); a photograph, file or folder; a sequence of photographs or
files; or any iterable of preprocessed batches (of which a tuple's first entry is taken, as from a labelled DataLoader)."""

_PHOTOGRAPH = str | Path | Image.Image


class ImageStream:
    """Batches of preprocessed images from whatever the user gave, with names and a hash for provenance.

    Args:
        images: See `Images`.
        preprocessing: Needed for photographs and files; batches of tensors are taken as they are.
        batch_size: Images a batch, where this class forms the batches.
        keep: How many photographs to keep for display, from the first, as the model saw them.

    Attributes:
        image_size: Height and width in pixels of what the model sees.

    Raises:
        InputError: If the images are of no known kind, there are none, or a file cannot be read (all files are decoded
            once at the start, so that a long run does not end at its last file).
    """

    def __init__(self, images: Images, preprocessing: Preprocessing | None, *, batch_size: int = 16, keep: int = 0) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.names: list[str] = []
        self.count: int | None = None
        self._digest = hashlib.sha256()
        self._keep = keep
        self._kept: list[np.ndarray] = []
        self._photographs: list[Any] = []
        self._given: Iterable[Any] = ()
        if isinstance(images, str | Path):
            images = find_images([images])
        elif isinstance(images, Image.Image):
            images = [images]
        elif isinstance(images, Tensor):
            self.count = len(_checked(images))
            images = [images[start : start + batch_size] for start in range(0, self.count, batch_size)]
        if not isinstance(images, Iterable):
            raise InputError(
                f"images must be a tensor, photographs, paths or an iterable of batches, got {type(images).__name__}"
            )
        if isinstance(images, list | tuple) and images and isinstance(images[0], _PHOTOGRAPH):
            self.image_size = self._open_photographs(list(images))
        else:
            self.image_size = self._open_batches(iter(images))

    def _open_photographs(self, photographs: list[Any]) -> tuple[int, int]:
        if not all(isinstance(item, _PHOTOGRAPH) for item in photographs):
            raise InputError("a list of photographs must hold PIL images or paths only")
        if self.preprocessing is None:
            raise InputError(
                "this model does not say how photographs are prepared for it; pass preprocessing=Preprocessing(...) or tensors"
            )
        for item in photographs:
            if not isinstance(item, Image.Image):
                read_image(item)
        self._photographs, self.count = photographs, len(photographs)
        return self.preprocessing.size

    def _open_batches(self, batches: Iterator[Any]) -> tuple[int, int]:
        first = next(batches, None)
        if first is None:
            raise InputError("there are no images; pass at least one")
        self._given = chain([first], batches)
        height, width = _checked(first).shape[2:]
        return height, width

    def __iter__(self) -> Iterator[Float[Tensor, "batch channel height width"]]:
        """Goes through the images; for an iterable of batches, once only."""
        self.names, self._digest, self._kept = [], hashlib.sha256(), []
        for batch in self._batches():
            if tuple(batch.shape[-2:]) != self.image_size:
                raise InputError(
                    f"images of {batch.shape[-2]} x {batch.shape[-1]} pixels follow ones of {self.image_size[0]} x "
                    f"{self.image_size[1]}; measure one size at a time"
                )
            if self.preprocessing is not None and (missing := self._keep - sum(map(len, self._kept))) > 0:
                self._kept.append(self.preprocessing.denormalize(batch[:missing]))
            yield batch

    def kept(self) -> np.ndarray | None:
        """The photographs kept for display, uint8 (image, height, width, channel); None where no preprocessing is known."""
        return np.concatenate(self._kept) if self._kept else None

    def _batches(self) -> Iterator[Tensor]:
        for start in range(0, len(self._photographs), self.batch_size):
            yield torch.stack([self._prepare(item) for item in self._photographs[start : start + self.batch_size]])
        for batch in self._given:
            yield self._seen(_checked(batch))

    def provenance(self) -> dict[str, Any]:
        """Number, names and hash of the images that the last iteration went through."""
        return {"count": len(self.names), "names": self.names, "sha256": self._digest.hexdigest()}

    def _prepare(self, item: str | Path | Image.Image) -> Tensor:
        if isinstance(item, Image.Image):
            image, name = item, item.info.get("name", f"image {len(self.names)}")
        else:
            image, name = read_image(item), Path(item).name
        assert self.preprocessing is not None
        self.names.append(str(name))
        self._digest.update(image.tobytes())
        return self.preprocessing(image)

    def _seen(self, batch: Tensor) -> Tensor:
        first = len(self.names)
        self.names += [f"image {index}" for index in range(first, first + len(batch))]
        self._digest.update(batch.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return batch


def _checked(batch: Any) -> Float[Tensor, "batch channel height width"]:
    """The batch, without its labels; InputError unless it is one of preprocessed images."""
    batch = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(batch, Tensor) or batch.ndim != 4:
        shape = f" of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else ""
        raise InputError(
            f"images as tensors have the shape (batch, channel, height, width), got {type(batch).__name__}{shape}; "
            "photographs are PIL images or paths, in a list"
        )
    if not batch.is_floating_point():
        raise InputError(f"images are {batch.dtype}; tensors must be preprocessed as the model expects them, as floats")
    return batch
