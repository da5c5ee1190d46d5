"""Finding and reading photographs, and preparing them for a model."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import glob, has_magic
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vit_probe.errors import InputError

__all__ = [
    "UNREADABLE",
    "Preprocessing",
    "as_triple",
    "check_image",
    "decode_image",
    "decoding",
    "expand_source",
    "find_images",
    "read_image",
    "sample_photographs",
]

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
_FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""What Pillow raises on files that it cannot read."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How a photograph becomes a model's input: RGB, resized, centre-cropped, scaled to [0, 1], standardised.

    Args:
        size: Height and width of the result in pixels.
        resize: Before the crop: an int is the length of the shorter side, a pair the exact height and width.
        mean: Subtracted, per channel.
        std: Divided by, per channel.
        interpolation: Pillow's filter for resizing, antialiased.
    """

    size: tuple[int, int]
    resize: int | tuple[int, int]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Interpolation = "bicubic"

    @classmethod
    def usual(cls, size: tuple[int, int], **others: Any) -> Preprocessing:
        """The usual practice for ImageNet: a shorter side of 256/224 of `size`, then a central crop; `others` as above."""
        return cls(size, round(max(size) * 256 / 224), **others)

    def scaled(self, size: tuple[int, int]) -> Preprocessing:
        """The same for another size: what is cut off stays in proportion."""
        ratio = max(size) / max(self.size)
        if isinstance(self.resize, int):
            return replace(self, size=size, resize=round(self.resize * ratio))
        return replace(self, size=size, resize=(round(self.resize[0] * ratio), round(self.resize[1] * ratio)))

    def __call__(self, image: Image.Image) -> Float[Tensor, "channel height width"]:
        # NumPy: torch would start threads of its own in each thread that prepares images.
        mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (self.mean, self.std))
        pixels = np.asarray(self.crop(image)).transpose(2, 0, 1).astype(np.float32, order="C")
        pixels /= 255
        pixels -= mean
        pixels /= std
        return torch.from_numpy(pixels)

    def crop(self, image: Image.Image) -> Image.Image:
        """The part of the photograph that the model sees, as RGB of `size` pixels."""
        image = _rgb(image, "the image")
        if isinstance(self.resize, int):
            # In integers, as torchvision computes it: 55 * (224 / 55) in floating point is a pixel short of 224.
            width, height = (self.resize * length // min(image.size) for length in image.size)
        else:
            height, width = self.resize
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        rows, cols = self.size
        top, left = round((height - rows) / 2), round((width - cols) / 2)
        return image.crop((left, top, left + cols, top + rows))

    def denormalize(self, images: Float[Tensor, "batch channel height width"]) -> np.ndarray:
        """The photographs again, as uint8 (batch, height, width, channel), for display beside a result."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixels = images.detach().float().cpu() * std + mean
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def read_image(path: str | Path) -> Image.Image:
    """Reads and decodes a whole photograph as RGB, turned upright as its EXIF orientation says.

    Raises:
        InputError: If there is no such file, it is no image, or it is truncated.
    """
    with decoding(str(path)), Image.open(path) as image:
        return _rgb(image, str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """The same of an image file's bytes; `name` is for the errors."""
    with decoding(name), Image.open(BytesIO(data)) as image:
        return _rgb(image, name)


def check_image(path: str | Path) -> None:
    """Looks whether a photograph can be read, as far as that can be told without decoding it: an error of `read_image`.

    The header is read, and of a PNG file the checksums. JPEG files have none: one that is cut off passes.
    """
    try:
        with Image.open(path) as image:
            known = image.mode not in ("I", "F")
            image.verify()
    except UNREADABLE:
        known = False
    if not known:  # Pillow decodes some files that do not pass `verify`, so this is only a suspicion.
        read_image(path)


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Says as an InputError what is wrong with the image `name` that Pillow cannot read."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"there is no image file {name}") from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is not an image that can be read") from None
    except Image.DecompressionBombError:
        raise InputError(
            f"{name} has more pixels than is safe to decode; reduce it, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except UNREADABLE as error:
        raise InputError(f"{name} cannot be decoded ({error}); the file may be truncated") from None


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """The image as 8-bit RGB, turned upright; 16 bits are scaled, transparency is ignored."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(
            f"{name} holds 32-bit values (mode {image.mode}), whose range is not known; convert it to 8 or 16 bits"
        )
    return image.convert("RGB")


def find_images(sources: Sequence[str | Path]) -> list[Path]:
    """The image files that `sources` name, in order: files, folders and patterns; see `expand_source`.

    Raises:
        InputError: If a source does not exist, a folder holds no image, or a pattern matches none.
    """
    found: list[Path] = []
    for source in sources:
        files = expand_source(source)
        if files == [Path(source)] and not files[0].is_file():
            raise InputError(f"there is no image file or folder {source}")
        found += files
    return found


def expand_source(source: str | Path) -> list[Path]:
    """The image files of a folder, searched to the bottom, or those that match a pattern such as `photos/**/*.jpg`.

    They are told by their endings and sorted, without hidden ones. Anything else is a file, whether there is one or not.

    Raises:
        InputError: If a folder holds no image, or a pattern matches none.
    """
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in _FORMATS}
    path = Path(source)
    if path.is_dir():
        inside = (file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() in endings)
        files = sorted(path / file for file in inside if not any(part.startswith(".") for part in file.parts))
        if not files:
            raise InputError(f"the folder {source} holds no image file")
        return files
    if has_magic(str(source)) and not path.exists():
        matching = map(Path, glob(str(source), recursive=True))
        files = sorted(file for file in matching if file.suffix.lower() in endings and file.is_file())
        if not files:
            raise InputError(f"the pattern {source} matches no image file")
        return files
    return [path]


def sample_photographs(count: int = 128) -> list[Image.Image]:
    """Three photographs that come with installed libraries, then deterministic crops of them, `count` in all.

    `china.jpg` (by danielbuechele on Flickr, CC BY 2.0) and `flower.jpg` (by vultilion on Flickr, CC BY 2.0) ship with
    scikit-learn, `grace_hopper.jpg` (public domain) with matplotlib. Each carries its name in `image.info["name"]`.
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


def as_triple(values: Iterable[Any]) -> tuple[float, float, float]:
    """Three numbers, one a colour channel, as a configuration file gives them."""
    red, green, blue = (float(value) for value in values)
    return red, green, blue
