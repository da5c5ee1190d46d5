"""Finding and reading photographs, and preprocessing them for a model."""

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
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "READ_ERRORS",
    "Interpolation",
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
READ_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that it cannot read."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Pillow registers endings of documents and volumes too (PDF, EPS, HDF5, ...), which a folder of photographs may also hold.
_PHOTOGRAPH_FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of photographs for a model: RGB, resize, centre crop, scale to [0, 1], standardise.

    Args:
        size: Height and width of the result in pixels.
        resize: Before the crop: an int is the length of the shorter side, a pair the exact height and width.
        mean: Subtracted, per channel.
        std: Divided by, per channel.
        interpolation: Pillow's filter for resizing, antialiased.

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

    @classmethod
    def imagenet(cls, size: tuple[int, int], **options: Any) -> Preprocessing:
        """The usual evaluation preprocessing for ImageNet: resize the shorter side to 256/224 of `size`, then centre crop.

        Args:
            size: Height and width of the result in pixels.
            **options: `mean`, `std` and `interpolation`, as for the class.
        """
        return cls(size, round(max(size) * 256 / 224), **options)

    def scaled(self, size: tuple[int, int]) -> Preprocessing:
        """The same preprocessing for another size; the crop keeps the same proportion of the photograph."""
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
        """The part of the photograph that the model sees, as an RGB image of `size` pixels."""
        image = _upright_rgb(image, "the image")
        if isinstance(self.resize, int):
            # In integers, as torchvision computes it: 55 * (224 / 55) in floating point is a pixel short of 224.
            width, height = (self.resize * length // min(image.size) for length in image.size)
        else:
            height, width = self.resize
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        rows, cols = self.size
        # Half a pixel is rounded to even, as torchvision's CenterCrop does.
        top, left = round((height - rows) / 2), round((width - cols) / 2)
        return image.crop((left, top, left + cols, top + rows))

    def denormalize(self, images: Float[Tensor, "batch channel height width"]) -> np.ndarray:
        """Undo the standardisation, for display: uint8 (batch, height, width, channel)."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixels = images.detach().float().cpu() * std + mean
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def read_image(path: str | Path) -> Image.Image:
    """Read and decode an image file as RGB, turned upright according to its EXIF orientation.

    Raises:
        InputError: If the file does not exist, is not an image, or is truncated.
    """
    with decoding(str(path)), Image.open(path) as image:
        return _upright_rgb(image, str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file as `read_image` does; errors call the image `name`."""
    with decoding(name), Image.open(BytesIO(data)) as image:
        return _upright_rgb(image, name)


def check_image(path: str | Path) -> None:
    """Check that an image file is readable, without decoding it where possible.

    Reads the header and, of a PNG file, the checksums. JPEG files have no checksums: a truncated one passes.

    Raises:
        InputError: As `read_image`.
    """
    try:
        with Image.open(path) as image:
            valid = image.mode not in ("I", "F")
            image.verify()
    except READ_ERRORS:
        valid = False
    if not valid:  # Pillow decodes some files that fail `verify`, so only decoding can tell.
        read_image(path)


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turn Pillow's exceptions for an unreadable image into an InputError that calls the image `name`."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"there is no image file {name}") from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is not a readable image file") from None
    except Image.DecompressionBombError:
        raise InputError(
            f"{name} has more pixels than Pillow decodes by default; downsize it, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except READ_ERRORS as error:
        raise InputError(f"{name} cannot be decoded ({error}); the file may be truncated") from None


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """The image as 8-bit RGB, turned upright; 16-bit values are scaled, transparency is ignored."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8))  # 65535 / 257 = 255
    if image.mode in ("I", "F"):
        raise InputError(f"{name} holds 32-bit values (mode {image.mode}) of unknown range; convert it to 8 or 16 bits")
    return image.convert("RGB")


def find_images(sources: Sequence[str | Path]) -> list[Path]:
    """List the image files of files, folders and patterns, in the order of `sources`; see `expand_source`.

    Raises:
        InputError: If a source does not exist, a folder contains no image files, or a pattern matches none.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("b.png", "a.jpg", "notes.txt"):
        ...         (Path(folder) / name).touch()
        ...     [path.name for path in find_images([folder])], [path.name for path in find_images([f"{folder}/*.png"])]
        (['a.jpg', 'b.png'], ['b.png'])
    """
    paths: list[Path] = []
    for source in sources:
        files = expand_source(source)
        if files == [Path(source)] and not files[0].is_file():
            raise InputError(f"there is no image file or folder {source}")
        paths += files
    return paths


def expand_source(source: str | Path) -> list[Path]:
    """List the image files in a folder and its subfolders, or those that match a pattern such as `photos/**/*.jpg`.

    Image files are recognised by their extensions, sorted by path, and listed without hidden ones. Any other source is
    returned as a single file, whether it exists or not.

    Raises:
        InputError: If a folder contains no image files, or a pattern matches none.
    """
    extensions = {extension for extension, kind in Image.registered_extensions().items() if kind in _PHOTOGRAPH_FORMATS}
    path = Path(source)
    if path.is_dir():
        relative = (file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() in extensions)
        files = sorted(path / file for file in relative if not any(part.startswith(".") for part in file.parts))
        if not files:
            raise InputError(f"the folder {source} contains no image files")
        return files
    if has_magic(str(source)) and not path.exists():  # a file may be called [1].jpg
        matches = map(Path, glob(str(source), recursive=True))
        files = sorted(file for file in matches if file.suffix.lower() in extensions and file.is_file())
        if not files:
            raise InputError(f"the pattern {source} matches no image files")
        return files
    return [path]


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


def as_triple(values: Iterable[Any]) -> tuple[float, float, float]:
    """Convert the three numbers of a configuration file, one per colour channel, to a tuple of floats.

    Examples:
        >>> as_triple([0, 0.5, "1"])
        (0.0, 0.5, 1.0)
    """
    red, green, blue = (float(value) for value in values)
    return red, green, blue
