"""Attention rollout beside or on the photographs."""

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
from vit_probe.plots.layout import (
    BAR_INCHES,
    arrange,
    bar_margins,
    bar_with_ends,
    hide_ticks_and_spines,
    inches_per_pixel,
    mosaic,
    tile_centres,
)
from vit_probe.plots.style import WIDTHS, drawing_axes, fitting_text

__all__ = ["as_bytes", "attention_over_black", "checked_maps", "plot_rollout"]

_AXES = ("image", "row", "col")

_HEADINGS = ("Input", "Attention")
_HEADING_INCHES = 0.6  # width of "Attention" at 8 pt, with space on both sides
_TITLE_INCHES = 0.17
_MARGIN = 0.03  # inches
_MAX_HEIGHT = 8.5  # inches that a page leaves for a figure
_OVERLAY_OPACITY = 0.6
_VIRIDIS = mpl.colormaps["viridis"]


def attention_over_black(image: NDArray[np.uint8], attention: NDArray[Any]) -> NDArray[np.float64]:
    """Darken an image to black where attention is low.

    The map is resized to the image (bilinear), smoothed by a Gaussian whose full width at half maximum is one patch, scaled
    from 0 at its minimum to 1 at its maximum, and multiplied by the image. A constant map leaves the image unchanged.

    Args:
        image: (height, width, 3), uint8.
        attention: (row, col), one value per patch.

    Returns:
        (height, width, 3) in [0, 1].

    Raises:
        InputError: If a shape or dtype is wrong, or the attention is not finite.

    Examples:
        >>> import numpy as np
        >>> white = np.full((8, 8, 3), 255, dtype=np.uint8)
        >>> shown = attention_over_black(white, np.array([[0.0, 1.0]]))  # attention to the right half
        >>> shown[0, 0].tolist(), shown[0, 7].tolist()
        ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])

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

    Each map is scaled from its own minimum to its own maximum.

    Args:
        maps: (image, row, col).
        images: (image, height, width, 3), uint8, the photographs as the model saw them; if None, only the maps are drawn.
        kind: "pairs": the photograph beside `attention_over_black`; "heatmap": the photograph beside a grey copy overlaid with
            the map in colours.
        titles: One per photograph, written below it and shortened if too long.
        columns: Pairs (or maps) per row; if None, the number that makes the figure about square.
        ax: Axes to draw on; if None, a new figure.

    Returns:
        The axes, holding one image: the mosaic.

    Raises:
        InputError: If shapes or dtypes do not match, `kind` is unknown, or `columns` or the number of titles is wrong.

    Examples:
        >>> import numpy as np
        >>> random = np.random.default_rng(0)
        >>> photographs = random.integers(0, 256, size=(1, 32, 32, 3), dtype=np.uint8)
        >>> ax = plot_rollout(random.random((1, 4, 4)), photographs)
        >>> [text.get_text() for text in ax.get_xticklabels()]
        ['Input', 'Attention']

    References:
        Abnar & Zuidema 2020, arXiv:2005.00928; Dosovitskiy et al. 2021, arXiv:2010.11929, figures 6 and 14.
    """
    values = checked_maps(maps, "rollout", _AXES)
    pictures = None if images is None else _checked_images(images, len(values))
    _check_options(len(values), kind, titles, columns)
    tiles, photograph_width = _tiles(values, pictures, kind)
    height, width = tiles.shape[1:3]
    unit = height if pictures is None else photograph_width  # gaps are proportional to it
    if columns is None:
        columns = max(1, math.ceil((len(tiles) * height / width) ** 0.5 - 0.3))
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    gap = max(1, round((0.06 if pictures is None else 0.14) * unit))
    mosaic_width = columns * (width + gap) - gap
    with_bar = pictures is None or kind == "heatmap"
    title_inches = _TITLE_INCHES if titles else 0.0
    top = 0.08 if pictures is None else 0.22
    bottom = title_inches + (0.08 if with_bar else _MARGIN)
    right = BAR_INCHES if with_bar else _MARGIN
    if ax is None:
        widest = WIDTHS["icml" if columns == 1 else "neurips"] - _MARGIN - right
        # Many rows of titles would leave no height for pictures; the figure is then taller than a page.
        highest = max(_MAX_HEIGHT - rows * title_inches, _MAX_HEIGHT / 2)
        scale = min(widest / mosaic_width, highest / (rows * (height + 0.06 * unit)))
    else:
        scale = inches_per_pixel(ax, rows * height, mosaic_width)
    row_gap = max(1, round(0.06 * unit)) + round(title_inches / scale)
    picture = mosaic(arrange(tiles, columns, fill=255), gap=(row_gap, gap), fill=255)
    inches = (mosaic_width * scale, picture.shape[0] * scale)
    if with_bar:
        bottom, right, top = bar_margins(inches[1], bottom, top)
    size = (inches[0] + _MARGIN + right, inches[1] + bottom + top)
    with drawing_axes(ax, size, (_MARGIN, bottom, right, top)) as axes:
        axes.imshow(picture, aspect="equal")
        hide_ticks_and_spines(axes)
        if pictures is not None:
            left = tile_centres(columns, width, gap) - (width - photograph_width) / 2
            _draw_headings(axes, left, left + width - photograph_width, photograph_width * scale)
        for index, title in enumerate(titles or ()):
            row, col = divmod(index, columns)
            place = (col * (width + gap) + (width - 1) / 2, row * (height + row_gap) + height - 0.5)
            text = fitting_text(title, width * scale)
            axes.annotate(
                text, place, (0, -2), textcoords="offset points", ha="center", va="top", annotation_clip=False, parse_math=False
            )
        if with_bar:
            bar_with_ends(axes, *inches, ("min", "max"), "Attention")
    return axes


def _draw_headings(axes: Axes, left: NDArray[np.float64], right: NDArray[np.float64], inches: float) -> None:
    """Write a heading above each column of pictures, or a single one if the columns are too narrow.

    Args:
        axes: Axes of the mosaic.
        left: Centres of the photographs, in pixels.
        right: Centres of the pictures beside them, in pixels.
        inches: Width of a photograph.
    """
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", length=0)
    if inches >= _HEADING_INCHES:
        axes.set_xticks(np.stack([left, right], axis=1).ravel(), list(_HEADINGS) * len(left))
    else:
        axes.set_xticks([(left[0] + right[-1]) / 2], ["Pairs of input (left) and attention (right)"])


def _tiles(maps: NDArray[np.float64], images: NDArray[np.uint8] | None, kind: str) -> tuple[NDArray[np.uint8], int]:
    """Tiles of the mosaic, (image, height, width, 3) in uint8, and the width of a photograph (or map) within a tile."""
    if images is None:
        return as_bytes(np.stack([_VIRIDIS(_scaled(attention))[..., :3] for attention in maps])), maps.shape[2]
    count, height, width = images.shape[:3]
    gap = max(1, round(0.03 * width))
    tiles = np.full((count, height, 2 * width + gap, 3), 255, dtype=np.uint8)
    for tile, image, attention in zip(tiles, images, maps, strict=True):
        heat = _heat(attention, (height, width))
        tile[:, :width] = image
        if kind == "pairs":
            tile[:, -width:] = as_bytes(heat[..., None] * (image / 255.0))
        else:
            grey = np.asarray(Image.fromarray(image).convert("L"))[..., None] / 255.0
            tile[:, -width:] = as_bytes(_OVERLAY_OPACITY * _VIRIDIS(heat)[..., :3] + (1 - _OVERLAY_OPACITY) * grey)
    return tiles, width


def as_bytes(colours: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert colours in [0, 1] to uint8."""
    return np.rint(colours * 255).astype(np.uint8)


def _heat(attention: NDArray[np.float64], size: tuple[int, ...]) -> NDArray[np.float64]:
    """Resize a map to an image of (height, width), smooth it, and scale it to [0, 1]."""
    height, width = size
    resized = Image.fromarray(attention.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    # A Gaussian's full width at half maximum, here one patch, is 2.355 standard deviations.
    deviations = (height / attention.shape[0] / 2.355, width / attention.shape[1] / 2.355)
    return _scaled(gaussian_filter(np.asarray(resized, dtype=np.float64), deviations, mode="nearest"))


def _scaled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale values from 0 at the minimum to 1 at the maximum; if these are equal up to rounding, to 1 everywhere."""
    lowest, highest = values.min(), values.max()
    if highest - lowest <= 1e-6 * max(abs(lowest), abs(highest)):
        return np.ones_like(values)
    return np.asarray((values - lowest) / (highest - lowest))


def checked_maps(maps: NDArray[Any], kind: str, axes: Sequence[str]) -> NDArray[np.float64]:
    """Convert maps to float64, and raise InputError if they do not have these axes or are not finite.

    Args:
        maps: Maps to check.
        kind: "rollout" or "attention", for the error message.
        axes: Names of the axes that the maps must have.
    """
    values = np.asarray(maps, dtype=np.float64)
    if values.ndim != len(axes) or 0 in values.shape:
        raise InputError(f"{kind} maps have shape {values.shape}; they must be ({', '.join(axes)}), none empty")
    if not np.isfinite(values).all():
        raise InputError(f"{kind} maps have values that are not finite; check the weights and images of the model")
    return values


def _checked_images(images: NDArray[Any], count: int) -> NDArray[np.uint8]:
    pictures = np.asarray(images)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3 or 0 in pictures.shape:
        raise InputError(
            f"images are {pictures.dtype} of shape {pictures.shape}; they must be uint8, (image, height, width, 3), none empty"
        )
    if len(pictures) != count:
        raise InputError(f"there are {len(pictures)} images for {count} maps; pass one image per map")
    return pictures


def _check_options(count: int, kind: str, titles: Sequence[str] | None, columns: int | None) -> None:
    if kind not in ("pairs", "heatmap"):
        raise InputError(f"rollout cannot be drawn as {kind!r}; choose 'pairs' or 'heatmap'")
    if titles is not None and len(titles) != count:
        raise InputError(f"there are {len(titles)} titles for {count} maps; pass one title per map")
    if columns is not None and columns < 1:
        raise InputError(f"cannot draw rollout in {columns} columns; pass 1 or more")
