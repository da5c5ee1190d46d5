"""Small images for training: reading them into memory, and augmenting them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import ImageOps
from torch import Tensor
from torch.nn import functional as F

from vit_probe import InputError
from vit_probe.data.image_files import find_images, read_image
from vit_probe.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["Split", "augment", "mix", "normalize", "read_data", "read_split"]

SHEET_COLUMNS = 20


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    Args:
        images: The pixels.
        labels: Index of the class of each image.
        classes: Name of each class.
    """

    images: UInt8[Tensor, "image channel row col"]
    labels: Int[Tensor, " image"]
    classes: list[str]


def read_data(folder: Path, size: int) -> tuple[Split, Split]:
    """Read the images in `train` and in `val`.

    Raises:
        InputError: If `train` or `val` is missing, they do not hold the same classes, or a file cannot be read.
    """
    train, val = read_split(folder / "train", size), read_split(folder / "val", size)
    if train.classes != val.classes:
        apart = sorted(set(train.classes) ^ set(val.classes))
        raise InputError(f"{folder}: train and val have different classes; only one of them has {', '.join(apart[:5])}")
    return train, val


def read_split(folder: Path, size: int) -> Split:
    """Read the images in a folder, cropped and resized to `size` x `size` pixels; classes are sorted by name.

    For each class, the folder holds either a sheet of square images, 20 per row, of which the last ones may be black padding,
    or a folder of images.

    Raises:
        InputError: If it is missing, or a file cannot be read.
    """
    classes: dict[str, list[np.ndarray]] = {}
    for file in find_images([folder]):
        name, *inside = file.relative_to(folder).with_suffix("").parts
        classes.setdefault(name, []).extend([_fit(file, size)] if inside else _cut(file, size))
    names = sorted(classes)
    pixels = torch.from_numpy(
        np.stack([np.ascontiguousarray(image.transpose(2, 0, 1)) for name in names for image in classes[name]])
    )
    labels = torch.tensor([label for label, name in enumerate(names) for _ in classes[name]])
    return Split(pixels, labels, names)


def _fit(path: Path, size: int) -> np.ndarray:
    return np.asarray(ImageOps.fit(read_image(path), (size, size)))


def _cut(path: Path, size: int) -> list[np.ndarray]:
    sheet = read_image(path)
    side = sheet.width // SHEET_COLUMNS
    if sheet.width % SHEET_COLUMNS or not side or sheet.height % side:
        raise InputError(
            f"{path} is {sheet.width} x {sheet.height} pixels, which is not a sheet of square images, {SHEET_COLUMNS} per row; "
            "pass one such sheet or one folder of images per class"
        )
    corners = [(left, top) for top in range(0, sheet.height, side) for left in range(0, sheet.width, side)]
    tiles = [sheet.crop((left, top, left + side, top + side)) for left, top in corners]
    while len(tiles) > 1 and np.mean(np.asarray(tiles[-1])) < 1:
        tiles.pop()
    return [np.asarray(tile if side == size else tile.resize((size, size))) for tile in tiles]


def normalize(images: Tensor) -> Float[Tensor, "image channel row col"]:
    """Standardise pixel values (0 to 255) with the mean and standard deviation of ImageNet."""
    mean, std = (255 * torch.tensor(values, device=images.device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() - mean) / std


def augment(images: UInt8[Tensor, "image channel row col"], random: torch.Generator) -> Float[Tensor, "image channel row col"]:
    """Crop, mirror, rotate, shear and recolour each image at random, and standardise it.

    The geometric operations are those of RandAugment (arXiv:1909.13719), here as a single affine sampling; the colour
    operations are saturation, contrast and brightness.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(images), generator=random) * (high - low) + low

    area, aspect = uniform(0.35, 1), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    angle, shear = uniform(-0.3, 0.3) * (uniform(0, 1) < 0.5), uniform(-0.2, 0.2) * (uniform(0, 1) < 0.5)
    rows = [
        torch.stack([width * mirror * angle.cos(), width * (shear - angle.sin()), uniform(-1, 1) * (1 - width)], dim=1),
        torch.stack([height * mirror * angle.sin(), height * angle.cos(), uniform(-1, 1) * (1 - height)], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), grid.to(images.device), padding_mode="reflection", align_corners=False)
    saturation, contrast, brightness = (uniform(0.6, 1.4)[:, None, None, None].to(images.device) for _ in range(3))
    grey = moved.mean(dim=1, keepdim=True)
    coloured = grey + saturation * (moved - grey)
    middle = grey.mean(dim=(2, 3), keepdim=True)
    return normalize((brightness * (middle + contrast * (coloured - middle))).clamp(0, 255))


def mix(images: Tensor, random: torch.Generator) -> tuple[Tensor, Int[Tensor, " image"], float]:
    """Mix a batch with itself in another order, by mixup (arXiv:1710.09412) or cutmix (arXiv:1905.04899), equally likely.

    Returns:
        The mixed images, the index of each image's partner, and the share of each image's own pixels.
    """
    partner = torch.randperm(len(images), generator=random).to(images.device)
    choice, share, row, col = torch.rand(4, generator=random).tolist()
    others = images[partner]
    if choice < 0.5:
        return share * images + (1 - share) * others, partner, share

    def span(centre: float, length: int) -> tuple[int, int]:
        half = math.sqrt(1 - share) * length / 2
        return max(round(centre * length - half), 0), min(round(centre * length + half), length)

    (top, bottom), (left, right) = span(row, images.shape[2]), span(col, images.shape[3])
    images = images.clone()
    images[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return images, partner, 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
