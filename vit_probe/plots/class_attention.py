"""Attention of the class token in each head of a layer, beside the photograph and its rollout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from vit_probe.errors import InputError
from vit_probe.plots.layout import (
    BAR_INCHES,
    LOW_PICTURE_BAR_INCHES,
    LOW_PICTURE_INCHES,
    bar_margins,
    bar_with_ends,
    hide_ticks_and_spines,
    inches_per_pixel,
    mosaic,
    tile_centres,
)
from vit_probe.plots.rollout import as_bytes, attention_over_black, checked_maps
from vit_probe.plots.style import WIDTHS, drawing_axes, fitting_text, text_inches

__all__ = ["plot_class_attention"]

_HEADS_PER_ROW = 8
_MARGIN = 0.03  # inches
_BOTTOM_INCHES = 0.08  # fits the lower half of the colour bar's lowest number
_NAME_INCHES = 0.16  # above the pictures, for their names
_ROW_GAP_INCHES = 0.21  # between rows of pictures, where it holds the names of the row below
_MAX_HEIGHT = 8.5  # inches that a page leaves for a figure
_MIN_PICTURE_INCHES = 0.3  # lowest height of a picture; if a page cannot fit all of them, the figure is taller than a page
_BAR_ENDS_INCHES = 0.35  # length of the bar that the words at its ends take
_BAR_LABEL, _SHORT_BAR_LABEL = "Attention of a head", "Attention"
_VIRIDIS = mpl.colormaps["viridis"]


def plot_class_attention(
    maps: NDArray[Any],
    images: NDArray[np.uint8] | None,
    *,
    rollout: NDArray[Any] | None = None,
    heads: Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw each photograph, its rollout, and the attention of the class token in each head.

    The map of a head is drawn with one coloured rectangle per patch, from dark at 0 to bright at the map's own maximum. Colours
    are therefore comparable within a map, but not between heads or photographs. Rollout is drawn by `attention_over_black`,
    scaled from its minimum to its maximum, or in colours like a head if there are no photographs. More than eight heads are
    drawn in several rows of about equal length.

    Args:
        maps: (image, head, row, col), attention of the class token to the patches.
        images: (image, height, width, 3), uint8, the photographs as the model saw them; if None, only the maps are drawn.
        rollout: (image, row, col), drawn between the photograph and the heads; None to leave it out.
        heads: Heads to draw, in this order; all if None.
        ax: Axes to draw on; if None, a new figure 5.5 inches wide, or 3.25 if at most three pictures lie side by side.

    Returns:
        The axes, holding one image: the mosaic, with the colour bar of the heads beside it.

    Raises:
        InputError: If shapes or dtypes do not match, a map is not finite, or a head does not exist.

    Examples:
        >>> import numpy as np
        >>> random = np.random.default_rng(0)
        >>> photographs = random.integers(0, 256, size=(1, 32, 32, 3), dtype=np.uint8)
        >>> ax = plot_class_attention(random.random((1, 3, 4, 4)), photographs, heads=[0, 2])
        >>> [text.get_text() for text in ax.texts]
        ['Input', 'Head 0', 'Head 2']

    References:
        Caron et al. 2021, arXiv:2104.14294, figures 1 and 3; Dosovitskiy et al. 2021, arXiv:2010.11929, figures 6 and 14.
    """
    values = checked_maps(maps, "attention", ("image", "head", "row", "col"))
    heads = _checked_heads(heads, values.shape[1])
    _check_shape("photographs", images, (len(values), None, None, 3))
    _check_shape("rollout maps", rollout, (len(values), *values.shape[2:]))
    rollout = None if rollout is None else checked_maps(rollout, "rollout", ("image", "row", "col"))
    if images is not None and np.asarray(images).dtype != np.uint8:
        raise InputError(f"photographs are {np.asarray(images).dtype}; they must be uint8")
    leading = [name for name, given in (("Input", images), ("Rollout", rollout)) if given is not None]
    rows = -(-len(heads) // _HEADS_PER_ROW)
    heads_per_row = -(-len(heads) // rows)
    columns = len(leading) + heads_per_row
    places = [(0, column) for column in range(len(leading))]
    places += [(index // heads_per_row, len(leading) + index % heads_per_row) for index in range(len(heads))]
    height, width = values.shape[2:] if images is None else images.shape[1:3]
    tiles = np.full((len(values), rows, columns, height, width, 3), 255, dtype=np.uint8)
    for index, head_maps in enumerate(values):
        photograph = None if images is None else images[index]
        pictures = [] if photograph is None else [photograph]
        pictures += [] if rollout is None else [_rollout_picture(rollout[index], photograph)]
        pictures += [_heat(head_maps[head], (height, width)) for head in heads]
        for (row, column), picture in zip(places, pictures, strict=True):
            tiles[index, row, column] = picture
    # Names above the first photograph serve for all, unless the heads of each photograph take several rows.
    named_images = len(values) if rows > 1 else 1
    gap = max(1, round(0.06 * width))
    mosaic_width = columns * (width + gap) - gap
    if ax is None:
        page_scale = (_MAX_HEIGHT - named_images * rows * _ROW_GAP_INCHES) / (len(values) * rows * (height + gap))
        # A low picture needs more room for its colour bar, which may make it lower still.
        for right in (BAR_INCHES, LOW_PICTURE_BAR_INCHES):
            widest = WIDTHS["icml" if columns <= 3 else "neurips"] - _MARGIN - right
            scale = min(widest / mosaic_width, max(page_scale, _MIN_PICTURE_INCHES / height))
            if len(values) * rows * height * scale >= LOW_PICTURE_INCHES:
                break
    else:
        scale = inches_per_pixel(ax, len(values) * rows * height, mosaic_width)
    row_gap = gap if named_images == 1 else max(gap, round(_ROW_GAP_INCHES / scale))
    picture = mosaic(tiles.reshape(-1, *tiles.shape[2:]), gap=(row_gap, gap), fill=255)
    inches = mosaic_width * scale, picture.shape[0] * scale
    margins = _MARGIN, *bar_margins(inches[1], _BOTTOM_INCHES, _NAME_INCHES)
    size = inches[0] + margins[0] + margins[2], inches[1] + margins[1] + margins[3]
    with drawing_axes(ax, size, margins) as axes:
        axes.imshow(picture, aspect="equal")
        hide_ticks_and_spines(axes)
        centres = tile_centres(columns, width, gap)
        tile_inches = (width + gap) * scale
        names = [*(fitting_text(name, tile_inches) for name in leading), *_head_names(heads, tile_inches)]
        for index in range(named_images):
            for (row, column), name in zip(places, names, strict=True):
                top = (index * rows + row) * (height + row_gap) - 0.5
                axes.annotate(
                    name, (centres[column], top), (0, 2), textcoords="offset points", ha="center", va="bottom",
                    annotation_clip=False,
                )  # fmt: skip
        bar_with_ends(axes, *inches, ("0", "max"), _bar_label(inches[1]))
    return axes


def _head_names(heads: Sequence[int], inches: float) -> list[str]:
    """Names above the maps of heads; the number alone where there is no room for more."""
    names = [f"Head {head}" for head in heads]
    return names if max(map(text_inches, names)) < inches else [str(head) for head in heads]


def _heat(attention: NDArray[Any], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Map in colours, dark at 0 and bright at its maximum, at the size (height, width) of a photograph."""
    rows, cols = (np.arange(pixels) * patches // pixels for pixels, patches in zip(size, attention.shape, strict=True))
    highest = attention.max()
    return as_bytes(_VIRIDIS(attention / (highest if highest > 0 else 1))[rows[:, None], cols, :3])


def _rollout_picture(rollout: NDArray[Any], photograph: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    return _heat(rollout, rollout.shape) if photograph is None else as_bytes(attention_over_black(photograph, rollout))


def _bar_label(height: float) -> str:
    """The longer label that fits beside a colour bar of this height, in inches."""
    return _BAR_LABEL if text_inches(_BAR_LABEL) <= height - _BAR_ENDS_INCHES else _SHORT_BAR_LABEL


def _checked_heads(heads: Sequence[int] | None, count: int) -> list[int]:
    chosen = list(range(count)) if heads is None else list(heads)
    if not chosen or not all(0 <= head < count for head in chosen):
        raise InputError(f"cannot draw heads {chosen}: the maps have heads 0 to {count - 1}; choose one or more of those")
    return chosen


def _check_shape(display_name: str, array: NDArray[Any] | None, expected: tuple[int | None, ...]) -> None:
    """Raise InputError if an array that is not None has another shape; a length of None stands for any positive length."""
    if array is None:
        return
    shape = np.shape(array)
    matches = len(shape) == len(expected) and all(
        length > 0 if wanted is None else length == wanted for length, wanted in zip(shape, expected, strict=True)
    )
    if not matches:
        wanted_shape = ", ".join("any" if length is None else str(length) for length in expected)
        raise InputError(f"{display_name} have shape {shape}; to match the attention maps, they must be ({wanted_shape})")
