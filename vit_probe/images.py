"""Reading photographs, preparing them for a model, and streaming them in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vit_probe.errors import InputError

__all__ = ["ImageStream", "Images", "Preprocessing", "find_images", "read_image", "sample_photographs"]

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Images = Tensor | str | Path | Iterable[Any]
"""A preprocessed tensor (batch, channel, height, width); a photograph, file or folder; a sequence of photographs or
files; or any iterable of preprocessed batches (of which a tuple's first entry is taken, as from a labelled DataLoader)."""

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

    def __call__(self, image: Image.Image) -> Float[Tensor, "channel height width"]:
        pixels = torch.from_numpy(np.array(self.crop(image))).permute(2, 0, 1).float() / 255
        return ((pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]).contiguous()

    def crop(self, image: Image.Image) -> Image.Image:
        """The part of the photograph that the model sees, as RGB of `size` pixels."""
        image = image.convert("RGB")
        if isinstance(self.resize, int):
            scale = self.resize / min(image.size)
            shorter_first = image.width <= image.height
            width = self.resize if shorter_first else int(image.width * scale)
            height = int(image.height * scale) if shorter_first else self.resize
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
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"there is no image file {path}") from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image that can be read") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} cannot be decoded ({error}); the file may be truncated") from None


def find_images(sources: Sequence[str | Path]) -> list[Path]:
    """The image files that `sources` name, in order; folders are searched with all they hold, sorted by path.

    Raises:
        InputError: If a source does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            extensions = Image.registered_extensions()
            files = sorted(path for path in source.rglob("*") if path.suffix.lower() in extensions and path.is_file())
            if not files:
                raise InputError(f"the folder {source} holds no image file")
            found += files
        elif source.is_file():
            found.append(source)
        else:
            raise InputError(f"there is no image file or folder {source}")
    return found


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
        self._digest = hashlib.sha256()
        self._keep = keep
        self._kept: list[np.ndarray] = []
        if isinstance(images, str | Path | Image.Image):
            images = find_images([images]) if isinstance(images, str | Path) else [images]
        self._images: Any = images
        self._photographs = (
            isinstance(images, list | tuple) and bool(images) and isinstance(images[0], str | Path | Image.Image)
        )
        self.count: int | None = None
        if isinstance(images, Tensor) or (self._photographs and isinstance(images, list | tuple)):
            self.count = len(images)
        if isinstance(images, Tensor) and (images.ndim != 4 or len(images) == 0):
            raise InputError(f"a tensor of images has shape (batch, channel, height, width), got {tuple(images.shape)}")
        if isinstance(images, list | tuple) and not images:
            raise InputError("there are no images; pass at least one")
        if not isinstance(images, Iterable):
            raise InputError(
                f"images must be a tensor, photographs, paths or an iterable of batches, got {type(images).__name__}"
            )
        if self._photographs and preprocessing is None:
            raise InputError(
                "this model does not say how photographs are prepared for it; pass preprocessing=Preprocessing(...) or tensors"
            )
        if self._photographs:
            for path in images:
                if isinstance(path, str | Path):
                    read_image(path)
        elif not isinstance(images, Tensor):
            images = iter(images)
            first = next(images, None)
            if first is None:
                raise InputError("the iterable of images yielded none; pass at least one batch")
            self._images = chain([first], images)
            shape = self._tensor(first).shape
        if isinstance(images, Tensor):
            shape = images.shape
        self.image_size = preprocessing.size if self._photographs and preprocessing else (shape[-2], shape[-1])

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
        if isinstance(self._images, Tensor):
            for start in range(0, len(self._images), self.batch_size):
                yield self._seen(self._images[start : start + self.batch_size])
        elif self._photographs:
            for start in range(0, len(self._images), self.batch_size):
                yield torch.stack([self._prepare(item) for item in self._images[start : start + self.batch_size]])
        else:
            for batch in self._images:
                yield self._seen(self._tensor(batch))

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

    @staticmethod
    def _tensor(batch: Any) -> Tensor:
        batch = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(batch, Tensor) or batch.ndim != 4:
            shape = f" of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else ""
            raise InputError(
                "an iterable of images must yield tensors (batch, channel, height, width), "
                f"got {type(batch).__name__}{shape}; a list of photographs must hold PIL images or paths only"
            )
        return batch

    def _seen(self, batch: Tensor) -> Tensor:
        first = len(self.names)
        self.names += [f"image {index}" for index in range(first, first + len(batch))]
        self._digest.update(batch.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return batch
