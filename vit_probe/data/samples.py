"""One item of the given images: a photograph, file, tensor or batch, with or without a label."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from vit_probe.data.image_files import decoding, open_file, printable
from vit_probe.errors import InputError

__all__ = [
    "Sample",
    "checked_batch",
    "content_digest",
    "fingerprint",
    "image_of",
    "is_batch",
    "is_finite",
    "to_sample",
    "type_and_shape",
]

_IMAGE_KEYS = ("image", "img", "pixel_values")
_MASK_KEYS = ("pixel_mask", "pixel_attention_mask")


@dataclass(frozen=True)
class Sample:
    """An image as its source provides it.

    Args:
        index: Its index in the whole list of images.
        name: Its name in results and messages.
        item: A path, the bytes of an image file, a photograph, a preprocessed tensor, or why there is no image.
    """

    index: int
    name: str
    item: Path | bytes | Image.Image | Tensor | InputError


def to_sample(index: int, item: Any) -> Sample:
    """Extract the image of an item and name it.

    Raises:
        InputError: If the item contains no image. An image that cannot be read is a sample with that error instead, so that
            it can be skipped.

    Examples:
        >>> sample = to_sample(3, ("photographs/cat.jpg", "a label"))
        >>> sample.index, sample.name, sample.item.as_posix()
        (3, 'cat.jpg', 'photographs/cat.jpg')
    """
    image = image_of(item)
    name = f"image {index}"
    if image is None:
        return Sample(index, name, InputError(f"{name} is None"))
    if isinstance(image, Mapping):  # a row of a Hugging Face dataset with Image(decode=False)
        data, path = image.get("bytes"), Path(image.get("path") or name)
        return Sample(index, printable(path.name), path if data is None else data)
    if isinstance(image, str | Path):
        return Sample(index, printable(Path(image).name), Path(image))
    if isinstance(image, Image.Image):
        name = printable(image.info.get("name", name))
        try:
            with decoding(name):
                # Pillow loads lazily. Not left to the worker threads, two of which may be given the same image object.
                image.load()
        except InputError as error:
            return Sample(index, name, error)
    elif not is_finite(image):
        return Sample(index, name, InputError(f"{name} holds NaN or infinite values"))
    return Sample(index, name, image)


def checked_batch(batch: Any) -> Tensor:
    """The images of a batch, (batch, channel, height, width), without their labels.

    Raises:
        InputError: If it is not a batch of preprocessed images.
    """
    batch = _without_label(batch)
    if not isinstance(batch, Tensor) or batch.ndim != 4:
        shape = f" of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else ""
        raise InputError(
            f"a tensor of images must have shape (batch, channel, height, width), got {type(batch).__name__}{shape}; pass "
            "photographs as PIL images or paths, in a list"
        )
    return _checked_kind(batch)


def image_of(item: Any) -> Any:
    """The image of a dataset's item, without its label; None if the item is None.

    Raises:
        InputError: If the item contains no image.
    """
    image = _without_label(item)
    if isinstance(image, Tensor) and image.ndim == 3:
        return _checked_kind(image)
    is_file = isinstance(image, Mapping) and (image.get("bytes") is not None or image.get("path") is not None)
    if image is None or is_file or isinstance(image, str | Path | Image.Image):
        return image
    if isinstance(image, Mapping):
        raise InputError(
            f"an item is a dictionary with keys {sorted(map(str, image))}; its image must be under one of "
            f"{', '.join(map(repr, _IMAGE_KEYS))}"
        )
    shape = f" of shape {tuple(image.shape)}" if hasattr(image, "shape") else ""
    raise InputError(
        f"an image must be a PIL image, a path or a tensor (channel, height, width), got {type(image).__name__}{shape}; a "
        "batch must be a tensor (batch, channel, height, width)"
    )


def is_batch(item: Any) -> bool:
    """Whether an item is a batch of preprocessed images."""
    item = _without_label(item)
    return isinstance(item, Tensor) and item.ndim == 4


def fingerprint(item: Any) -> Iterator[Any]:
    """Yield what identifies an image or batch without decoding it: name and size of a file, values of what is in memory."""
    item = _without_label(item)
    if isinstance(item, str | Path):
        # Not the folder, so that photographs that were moved or copied are still the same.
        yield from (Path(item).name, os.path.getsize(item) if os.path.isfile(item) else None)
    elif isinstance(item, Image.Image):
        yield from (item.mode, item.size, item.info.get("name"), os.path.basename(getattr(item, "filename", "")))
        if not isinstance(item, ImageFile.ImageFile):  # one opened from a file would be decoded by `tobytes`
            yield item.tobytes()
    elif isinstance(item, Tensor):
        yield from (tuple(item.shape), item.dtype, _raw_bytes(item).tobytes())
    else:
        yield item


def content_digest(item: Path | bytes | Image.Image | Tensor) -> str:
    """A hash of what the source gives: the bytes of a file, or the pixels of an image in memory.

    Raises:
        InputError: If a file cannot be read.

    Examples:
        >>> content_digest(b"an image file")[:8]
        '88d287f3'
    """
    if isinstance(item, Path):
        with decoding(printable(item)), open_file(item) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if isinstance(item, Image.Image):
        item = item.tobytes()
    return hashlib.sha256(_raw_bytes(item) if isinstance(item, Tensor) else item).hexdigest()


def type_and_shape(image: Any) -> list[Any]:
    """The type and the shape or size of an image, as far as they are known without decoding it."""
    return [type(image).__name__, getattr(image, "shape", None) or getattr(image, "size", None)]


def _without_label(item: Any) -> Any:
    """The image or batch of an (image, label) pair or of a dictionary."""
    if isinstance(item, list) and len(item) > 1 and all(map(_is_image, item)):
        raise InputError(
            f"an item is a list of {len(item)} images; a batch must be a tensor (batch, channel, height, width), and an image "
            "with its target a tuple"
        )
    if isinstance(item, list | tuple) and item:
        item = item[0]
    if isinstance(item, Mapping):
        for key in _MASK_KEYS:
            if isinstance(mask := item.get(key), Tensor) and not mask.all():
                raise InputError(f"images are padded ({key} is not 1 everywhere); pass images of one size, without padding")
        item = next((item[key] for key in _IMAGE_KEYS if key in item), item)
    return item


def _is_image(item: Any) -> bool:
    if isinstance(item, str | Path):  # not the name of a class
        return Path(item).suffix.lower() in Image.registered_extensions()
    return isinstance(item, Image.Image) or (isinstance(item, Tensor) and item.ndim == 3)


def _checked_kind(images: Tensor) -> Tensor:
    """Check everything about a tensor of images but its values."""
    if not images.is_floating_point():
        raise InputError(
            f"image tensors must be floating point, preprocessed as the model expects them, got {images.dtype}; pass "
            "photographs as PIL images or paths to have them preprocessed"
        )
    if images.is_nested or images.is_meta or images.layout is not torch.strided:
        kind = "nested" if images.is_nested else "on the meta device" if images.is_meta else images.layout
        raise InputError(f"image tensors must be dense and hold values, got one that is {kind}")
    if 0 in images.shape[-3:]:
        raise InputError(f"image tensors must have pixels, got one of shape {tuple(images.shape)}")
    return images


def is_finite(images: Tensor) -> bool:
    """Whether all values of a tensor are finite."""
    # In NumPy, because torch would start its own thread pool in the thread that reads ahead.
    return bool(np.isfinite(images.detach().cpu().float().numpy()).all())


def _raw_bytes(images: Tensor) -> Any:
    return images.detach().cpu().contiguous().view(torch.uint8).numpy().data
