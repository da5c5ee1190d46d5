"""Attention rollout beside, or on, the photographs it belongs to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from vit_probe.errors import InputError
from vit_probe.plots.layout import BAR_INCHES, arrange, bar_margins, bar_of_ends, bare, centres, inches_per_pixel, mosaic
from vit_probe.plots.style import WIDTHS, drawing_axes, fitting_text

__all__ = ["as_bytes", "attention_over_black", "checked_maps", "plot_rollout"]

_AXES = ("image", "row", "col")

_HEADINGS = ("Input", "Attention")
_HEADING_INCHES = 0.6  # what "Attention" takes at 8 pt, with room on both sides
_TITLE_INCHES = 0.17
_MARGIN = 0.03
_TALLEST = 8.5  # what a page leaves for a figure
_OVERLAY = 0.6  # the heat map's share in the picture it is laid upon
_VIRIDIS = mpl.colormaps["viridis"]


def attention_over_black(image: NDArray[np.uint8], attention: NDArray[Any]) -> NDArray[np.float64]:
    """Show an image where attention is high, and black where it is low.

    The map is resized to the image (bilinear), smoothed with a Gaussian whose full width at half maximum is about a
    patch, scaled from 0 at its minimum to 1 at its maximum, and multiplied with the image. A constant map prefers
    no place, and leaves the image as it is.

    Args:
        image: (height, width, 3), uint8.
        attention: (row, col), one value a patch.

    Returns:
        (height, width, 3) in [0, 1].

    Raises:
        InputError: If a shape or dtype is another, or the attention is not finite.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 6 and appendix D.8.
    """
    maps = checked_maps(np.asarray(attention)[None], "rollout", _AXES)
    picture = _checked_images(np.asarray(image)[None], 1)[0]
    return np.asarray(_heat(maps[0], picture.shape[:2])[..., None] * (picture / 255.0))


def plot_rollout(
    maps: NDArray[Any],
    images: NDArray[np.uint8] | None,
    *,
    kind: Literal["pairs", "heatmap"] = "pairs",
    titles: Sequence[str] | None = None,
    columns: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw rollout maps with their photographs, as a mosaic of pairs.

    Every map is scaled from its own minimum to its own maximum.

    Args:
        maps: (image, row, col).
        images: (image, height, width, 3), uint8, the photographs as the model saw them; if None, maps alone are drawn.
        kind: "pairs": input beside `attention_over_black`; "heatmap": input beside a colour map laid upon it.
        titles: One a photograph, written below it, and shortened where it is too long.
        columns: Pairs (or maps) in a line; if None, as many as make the figure about square.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes, holding one image: the mosaic.

    Raises:
        InputError: If shapes, dtype, `kind`, `columns` or the number of titles do not fit.

    References:
        Abnar & Zuidema 2020, arXiv:2005.00928; Dosovitskiy et al. 2021, arXiv:2010.11929, figures 6 and 14.
    """
    values = checked_maps(maps, "rollout", _AXES)
    pictures = None if images is None else _checked_images(images, len(values))
    _check_options(len(values), kind, titles, columns)
    tiles, half = _tiles(values, pictures, kind)
    (height, width), unit = tiles.shape[1:3], tiles.shape[1] if pictures is None else half
    if columns is None:
        columns = max(1, math.ceil((len(tiles) * height / width) ** 0.5 - 0.3))
    columns = min(columns, len(tiles))
    lines = -(-len(tiles) // columns)
    between = max(1, round((0.06 if pictures is None else 0.14) * unit))
    across = columns * (width + between) - between
    with_bar = pictures is None or kind == "heatmap"
    title_inches = _TITLE_INCHES if titles else 0.0
    top = 0.08 if pictures is None else 0.22
    bottom = title_inches + (0.08 if with_bar else _MARGIN)
    right = BAR_INCHES if with_bar else _MARGIN
    if ax is None:
        widest = WIDTHS["icml" if columns == 1 else "neurips"] - _MARGIN - right
        room = max(_TALLEST - lines * title_inches, _TALLEST / 2)
        scale = min(widest / across, room / (lines * (height + 0.06 * unit)))
    else:
        scale = inches_per_pixel(ax, lines * height, across)
    below = max(1, round(0.06 * unit)) + round(title_inches / scale)
    picture = mosaic(arrange(tiles, columns, fill=255), gap=(below, between), fill=255)
    inches = (across * scale, picture.shape[0] * scale)
    if with_bar:
        bottom, right, top = bar_margins(inches[1], bottom, top)
    size = (inches[0] + _MARGIN + right, inches[1] + bottom + top)
    with drawing_axes(ax, size, (_MARGIN, bottom, right, top)) as axes:
        axes.imshow(picture, aspect="equal")
        bare(axes)
        if pictures is not None:
            left = centres(columns, width, between) - (width - half) / 2
            _head(axes, left, left + width - half, half * scale)
        for index, title in enumerate(titles or ()):
            row, col = divmod(index, columns)
            place = (col * (width + between) + (width - 1) / 2, row * (height + below) + height - 0.5)
            text = fitting_text(title, width * scale)
            axes.annotate(
                text, place, (0, -2), textcoords="offset points", ha="center", va="top", annotation_clip=False, parse_math=False
            )
        if with_bar:
            bar_of_ends(axes, *inches, ("min", "max"), "Attention")
    return axes


def _head(axes: Axes, left: NDArray[np.float64], right: NDArray[np.float64], inches: float) -> None:
    """Name the columns of pictures; once for all where they are too narrow to carry their names."""
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", length=0)
    if inches >= _HEADING_INCHES:
        axes.set_xticks(np.stack([left, right], axis=1).ravel(), list(_HEADINGS) * len(left))
    else:
        axes.set_xticks([(left[0] + right[-1]) / 2], ["Pairs of input (left) and attention (right)"])


def _tiles(maps: NDArray[np.float64], images: NDArray[np.uint8] | None, kind: str) -> tuple[NDArray[np.uint8], int]:
    """Each map's tile, (image, height, width, 3) in uint8, and the width of one of its halves."""
    if images is None:
        return as_bytes(np.stack([_VIRIDIS(_scaled(one))[..., :3] for one in maps])), maps.shape[2]
    count, height, width = images.shape[:3]
    gap = max(1, round(0.03 * width))
    tiles = np.full((count, height, 2 * width + gap, 3), 255, dtype=np.uint8)
    for tile, image, one in zip(tiles, images, maps, strict=True):
        heat = _heat(one, (height, width))
        tile[:, :width] = image
        if kind == "pairs":
            tile[:, -width:] = as_bytes(heat[..., None] * (image / 255.0))
        else:
            grey = np.asarray(Image.fromarray(image).convert("L"))[..., None] / 255.0
            tile[:, -width:] = as_bytes(_OVERLAY * _VIRIDIS(heat)[..., :3] + (1 - _OVERLAY) * grey)
    return tiles, width


def as_bytes(colours: NDArray[Any]) -> NDArray[np.uint8]:
    """Colours in [0, 1] as a picture holds them."""
    return np.rint(colours * 255).astype(np.uint8)


def _heat(attention: NDArray[np.float64], size: tuple[int, ...]) -> NDArray[np.float64]:
    """The map at the image's size (height, width), smooth, in [0, 1]."""
    height, width = size
    resized = Image.fromarray(attention.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    deviations = (height / attention.shape[0] / 2.355, width / attention.shape[1] / 2.355)
    return _scaled(gaussian_filter(np.asarray(resized, dtype=np.float64), deviations, mode="nearest"))


def _scaled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """From 0 at the minimum to 1 at the maximum; 1 everywhere if they are equal but for rounding."""
    lowest, highest = values.min(), values.max()
    if highest - lowest <= 1e-6 * max(abs(lowest), abs(highest)):
        return np.ones_like(values)
    return np.asarray((values - lowest) / (highest - lowest))


def checked_maps(maps: NDArray[Any], what: str, axes: Sequence[str]) -> NDArray[np.float64]:
    """Maps in float64; InputError, which calls them `what`, if they do not have these axes or are not finite."""
    values = np.asarray(maps, dtype=np.float64)
    if values.ndim != len(axes) or 0 in values.shape:
        raise InputError(f"{what} maps have shape {values.shape}; they must be ({', '.join(axes)}), none empty")
    if not np.isfinite(values).all():
        raise InputError(f"{what} maps hold values that are not finite; check the model's weights and images")
    return values


def _checked_images(images: NDArray[Any], count: int) -> NDArray[np.uint8]:
    pictures = np.asarray(images)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3 or 0 in pictures.shape:
        raise InputError(
            f"images are {pictures.dtype} of shape {pictures.shape}; they must be uint8, (image, height, width, 3), none empty"
        )
    if len(pictures) != count:
        raise InputError(f"{len(pictures)} images came with {count} maps; give one a map")
    return pictures


def _check_options(count: int, kind: str, titles: Sequence[str] | None, columns: int | None) -> None:
    if kind not in ("pairs", "heatmap"):
        raise InputError(f"rollout cannot be drawn as {kind!r}; choose 'pairs' or 'heatmap'")
    if titles is not None and len(titles) != count:
        raise InputError(f"{len(titles)} titles came with {count} maps; give one a map")
    if columns is not None and columns < 1:
        raise InputError(f"cannot draw rollout in {columns} columns; give 1 or more")
