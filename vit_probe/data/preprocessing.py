"""Preprocessing photographs for a model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vit_probe.data.image_files import upright_rgb
from vit_probe.errors import InputError

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "CropRounding", "Interpolation", "Preprocessing", "as_triple", "sample_photographs"]

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CropRounding = Literal["half_to_even", "down"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of photographs for a model: RGB, resize, centre crop, scale to [0, 1], standardise.

    Photographs are turned upright according to their EXIF orientation, values of 16 bits are scaled to 8, and transparency is
    ignored, as in timm, torchvision and open_clip; transformers 5 puts transparent images on white.

    Args:
        size: Height and width of the result in pixels.
        resize: Before the crop: an int is the length of the shorter side, a pair the exact height and width.
        mean: Subtracted, per channel.
        std: Divided by, per channel.
        interpolation: Pillow's filter for resizing, antialiased.
        crop_rounding: How half a pixel of margin above or left of the crop is rounded: `half_to_even` as in torchvision, timm
            and open_clip, or `down` as in transformers.

    Examples:
        >>> from PIL import Image
        >>> preprocessing = Preprocessing(size=(224, 224), resize=256)
        >>> photograph = Image.new("RGB", (640, 480), "white")
        >>> preprocessing(photograph).shape
        torch.Size([3, 224, 224])
        >>> preprocessing.crop(photograph).size
        (224, 224)
    """

    size: tuple[int, int]
    resize: int | tuple[int, int]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Interpolation = "bicubic"
    crop_rounding: CropRounding = "half_to_even"

    def __post_init__(self) -> None:
        resize = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize
        if not _are_numbers(self.size, int, 2) or not _are_numbers(resize, int, 2):
            raise InputError(
                f"size must be a pair (height, width), such as (224, 224), and resize an int or a pair; got {self.size!r} and "
                f"{self.resize!r}"
            )
        lengths = [*self.size, *resize]
        if not _are_numbers(self.mean, Real, 3) or not _are_numbers(self.std, Real, 3):
            raise InputError(
                f"mean and std must have three values each, one per colour channel, such as (0.5, 0.5, 0.5); got {self.mean!r} "
                f"and {self.std!r}"
            )
        if self.interpolation not in get_args(Interpolation):
            raise InputError(f"interpolation must be one of {', '.join(get_args(Interpolation))}; got {self.interpolation!r}")
        if min(lengths) < 1:
            raise InputError(f"size and resize must be at least 1 pixel, got size={self.size} and resize={self.resize}")
        if min(self.std) <= 0 or not all(map(math.isfinite, (*self.mean, *self.std))):
            raise InputError(f"mean and std must be finite, and std above 0, got mean={self.mean} and std={self.std}")
        if self.crop_rounding not in get_args(CropRounding):
            raise InputError(f"crop_rounding must be {' or '.join(get_args(CropRounding))}, got {self.crop_rounding!r}")

    @classmethod
    def imagenet(cls, size: tuple[int, int], **options: Any) -> Preprocessing:
        """The usual evaluation preprocessing for ImageNet: resize the shorter side to 256/224 of `size`, then centre crop.

        Args:
            size: Height and width of the result in pixels.
            **options: `mean`, `std` and `interpolation`, as for the class.
        """
        _check_size(size)
        return cls(size, round(max(size) * 256 / 224), **options)

    def scaled(self, size: tuple[int, int]) -> Preprocessing:
        """The same preprocessing for another size; the crop keeps the same proportion of the photograph."""
        _check_size(size)
        ratio = max(size) / max(self.size)
        if isinstance(self.resize, int):
            return replace(self, size=size, resize=round(self.resize * ratio))
        return replace(self, size=size, resize=(round(self.resize[0] * ratio), round(self.resize[1] * ratio)))

    def __call__(self, image: Image.Image) -> Float[Tensor, "channel height width"]:
        # In NumPy, because torch would start its own thread pool in each of the threads that prepare images.
        mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (self.mean, self.std))
        pixels = np.asarray(self.crop(image)).transpose(2, 0, 1).astype(np.float32, order="C")
        pixels /= 255
        pixels -= mean
        pixels /= std
        return torch.from_numpy(pixels)

    def crop(self, image: Image.Image) -> Image.Image:
        """The part of the photograph that the model sees, as an RGB image of `size` pixels.

        Raises:
            InputError: If the resized photograph would have more pixels than Pillow decodes by default
                (`PIL.Image.MAX_IMAGE_PIXELS`), because one of its sides is very much shorter than the other.
        """
        image = upright_rgb(image, "the image")
        width, height = self._resized(image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        rows, cols = self.size
        top, left = self._margin(height - rows), self._margin(width - cols)
        return image.crop((left, top, left + cols, top + rows))

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height after the resize of a photograph of this width and height."""
        if isinstance(self.resize, int):
            # In integers, as torchvision computes it: 55 * (224 / 55) in floating point is a pixel short of 224.
            width, height = (self.resize * length // min(size) for length in size)
        else:
            height, width = self.resize
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and width * height > max(limit, size[0] * size[1]):
            raise InputError(
                f"an image of {size[0]} x {size[1]} pixels (width x height) would be resized to {width} x {height}, more than "
                "Pillow decodes by default; crop it, or raise PIL.Image.MAX_IMAGE_PIXELS"
            )
        return width, height

    def _margin(self, pixels: int) -> int:
        """How many of the `pixels` that the crop leaves out, or pads where they are negative, lie above or left of it."""
        if pixels < 0 or self.crop_rounding == "down":
            return int(pixels / 2)  # towards 0: all three libraries pad less above and left than below and right
        return round(pixels / 2)

    def denormalize(self, images: Float[Tensor, "batch channel height width"]) -> np.ndarray:
        """Undo the standardisation, for display: uint8 (batch, height, width, channel)."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixels = images.detach().float().cpu() * std + mean
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def sample_photographs(count: int = 128) -> list[Image.Image]:
    """Three photographs that ship with installed libraries, followed by deterministic random crops of them.

    `china.jpg` (by danielbuechele on Flickr, CC BY 2.0) and `flower.jpg` (by vultilion on Flickr, CC BY 2.0) ship with
    scikit-learn, `grace_hopper.jpg` (public domain) with matplotlib. Each image has its name in `image.info["name"]`.

    Args:
        count: Number of images to return.

    Examples:
        >>> [image.info["name"] for image in sample_photographs(4)]
        ['china', 'flower', 'grace_hopper', 'china, crop 1']
    """
    import sklearn.datasets
    from matplotlib import cbook

    whole = [(name, Image.fromarray(sklearn.datasets.load_sample_image(f"{name}.jpg"))) for name in ("china", "flower")]
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as portrait:
        whole.append(("grace_hopper", portrait.convert("RGB")))
    photographs = []
    random = np.random.default_rng(0)
    for index in range(count):
        name, image = whole[index % len(whole)]
        if index >= len(whole):
            side = int(min(image.size) * random.uniform(0.55, 0.95))
            left, top = (int(random.integers(length - side + 1)) for length in image.size)
            image = image.crop((left, top, left + side, top + side))
            name = f"{name}, crop {index // len(whole)}"
        else:
            image = image.copy()
        image.info["name"] = name
        photographs.append(image)
    return photographs


def _check_size(size: object) -> None:
    if not _are_numbers(size, int, 2):
        raise InputError(f"size must be a pair (height, width), such as (224, 224); got {size!r}")


def _are_numbers(values: object, kind: type, count: int) -> bool:
    """Whether these are `count` numbers, of a type; truth values are none."""
    if not isinstance(values, tuple | list) or len(values) != count:
        return False
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


def as_triple(values: Iterable[Any]) -> tuple[float, float, float]:
    """Convert the three numbers of a configuration file, one per colour channel, to a tuple of floats.

    Examples:
        >>> as_triple([0, 0.5, "1"])
        (0.0, 0.5, 1.0)
    """
    red, green, blue = (float(value) for value in values)
    return red, green, blue
