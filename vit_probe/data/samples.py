"""What one item of the given images is: a photograph, a file, a tensor or a batch, with or without its label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFile
from torch import Tensor

from vit_probe.data.preprocessing import decoding
from vit_probe.errors import InputError

__all__ = ["Sample", "checked_batch", "content", "image_of", "is_batch", "kind_and_shape", "to_sample"]

_IMAGE_KEYS = ("image", "img", "pixel_values")


@dataclass(frozen=True)
class Sample:
    """An image as its source gives it: a path, an image file's bytes, a photograph, a tensor, or what is wrong with it."""

    index: int
    name: str
    item: Path | bytes | Image.Image | Tensor | InputError


def to_sample(index: int, item: Any) -> Sample:
    """The image of an item, with its name; InputError if there is none in it."""
    image = image_of(item)
    name = f"image {index}"
    if image is None:
        return Sample(index, name, InputError(f"{name} is None"))
    if isinstance(image, Mapping):  # of Hugging Face, not decoded
        data, path = image.get("bytes"), Path(image.get("path") or name)
        return Sample(index, path.name, path if data is None else data)
    if isinstance(image, str | Path):
        return Sample(index, Path(image).name, Path(image))
    if isinstance(image, Image.Image):
        name = str(image.info.get("name", name))
        try:
            with decoding(name):
                image.load()  # here, one after the other: the same image may be there twice
        except InputError as error:
            return Sample(index, name, error)
    return Sample(index, name, image)


def checked_batch(batch: Any) -> Tensor:
    """The batch (batch, channel, height, width), without its labels; InputError unless it is one of preprocessed images."""
    batch = _without_label(batch)
    if not isinstance(batch, Tensor) or batch.ndim != 4:
        shape = f" of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else ""
        raise InputError(
            f"images as tensors have the shape (batch, channel, height, width), got {type(batch).__name__}{shape}; "
            "photographs are PIL images or paths, in a list"
        )
    return _checked_floats(batch)


def image_of(item: Any) -> Any:
    """The image of an item of a dataset; InputError if there is none."""
    image = _without_label(item)
    if isinstance(image, Tensor) and image.ndim == 3:
        return _checked_floats(image)
    file = isinstance(image, Mapping) and (image.get("bytes") is not None or image.get("path") is not None)
    if image is None or file or isinstance(image, str | Path | Image.Image):
        return image
    if isinstance(image, Mapping):
        raise InputError(f"an image is a dictionary of {sorted(map(str, image))}; the image itself must be under 'image'")
    shape = f" of shape {tuple(image.shape)}" if hasattr(image, "shape") else ""
    raise InputError(
        f"images are PIL images, paths or tensors (channel, height, width), got {type(image).__name__}{shape}; batches have "
        "the shape (batch, channel, height, width)"
    )


def is_batch(item: Any) -> bool:
    """Whether an item is a batch of preprocessed images."""
    item = _without_label(item)
    return isinstance(item, Tensor) and item.ndim == 4


def content(item: Any) -> Iterator[Any]:
    """What tells an image or batch from others, without decoding it: of a file path and size, in memory the numbers."""
    item = _without_label(item)
    if isinstance(item, str | Path):
        yield from (str(item), Path(item).stat().st_size if Path(item).is_file() else None)
    elif isinstance(item, Image.Image):
        yield from (item.mode, item.size, item.info.get("name"), getattr(item, "filename", None))
        if not isinstance(item, ImageFile.ImageFile):  # those lie in a file, decoded or not
            yield item.tobytes()
    elif isinstance(item, Tensor):
        yield from (tuple(item.shape), item.dtype, item.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    else:
        yield item


def kind_and_shape(image: Any) -> list[Any]:
    """The kind of an image and its size, as far as they can be told without decoding it."""
    return [type(image).__name__, getattr(image, "shape", None) or getattr(image, "size", None)]


def _without_label(item: Any) -> Any:
    """The image or batch of a (image, label) pair or of a dictionary."""
    if isinstance(item, list | tuple) and item:
        item = item[0]
    if isinstance(item, Mapping):
        item = next((item[key] for key in _IMAGE_KEYS if key in item), item)
    return item


def _checked_floats(images: Tensor) -> Tensor:
    if not images.is_floating_point():
        raise InputError(f"images are {images.dtype}; tensors must be preprocessed as the model expects them, as floats")
    return images
