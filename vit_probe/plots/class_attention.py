"""The class token's attention in each head of a layer, beside the photograph and its rollout."""

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
    LOW,
    LOW_BAR_INCHES,
    bar_margins,
    bar_of_ends,
    bare,
    centres,
    inches_per_pixel,
    mosaic,
)
from vit_probe.plots.rollout import as_bytes, attention_over_black, checked_maps
from vit_probe.plots.style import WIDTHS, drawing_axes, fitting_text, text_inches

__all__ = ["plot_class_attention"]

_HEADS_IN_A_LINE = 8
_MARGIN = 0.03
_BELOW = 0.08  # where half of the colour bar's lowest number stands
_NAME_INCHES = 0.16
_GAP_INCHES = 0.21  # between lines of pictures, where it holds the names of those below
_TALLEST = 8.5  # what a page leaves for a figure
_LOWEST = 0.3  # inches of a picture; where a page does not hold them all, the figure is taller
_ENDS_INCHES = 0.35  # of the bar, which these words take
_BAR_LABELS = ("Attention of a head", "Attention")  # the second where the bar is too low for the first
_VIRIDIS = mpl.colormaps["viridis"]


def plot_class_attention(
    maps: NDArray[Any],
    images: NDArray[np.uint8] | None,
    *,
    rollout: NDArray[Any] | None = None,
    heads: Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw for each photograph the input, its rollout, and what the class token attends to in each head.

    The map of a head is shown in colours, from dark at 0 to bright at the map's own maximum, one rectangle a patch: a colour
    compares a patch with the others of its map, and not with those of another head or photograph. Rollout is shown by
    `attention_over_black`, from its minimum to its maximum; without photographs, like a head. More than eight heads are broken
    into lines of about equal length.

    Args:
        maps: (image, head, row, col).
        images: (image, height, width, 3), uint8, the photographs as the model saw them; if None, maps alone are drawn.
        rollout: (image, row, col), drawn between the input and the heads; None for none.
        heads: Which heads to draw, in this order; all if None.
        ax: Where to draw; if None a new figure, 5.5 inches wide, or 3.25 where three pictures or fewer lie side by side.

    Returns:
        The axes, holding one image, the mosaic, with the colour bar of the heads beside it.

    Raises:
        InputError: If shapes or dtype do not fit, a map is not finite, or there is no such head.

    References:
        Caron et al. 2021, arXiv:2104.14294, figures 1 and 3; Dosovitskiy et al. 2021, arXiv:2010.11929, figures 6 and 14.
    """
    values = checked_maps(maps, "attention", ("image", "head", "row", "col"))
    chosen = _checked_heads(heads, values.shape[1])
    _check_beside("photographs", images, (len(values), None, None, 3))
    _check_beside("rollout maps", rollout, (len(values), *values.shape[2:]))
    rolled = None if rollout is None else checked_maps(rollout, "rollout", ("image", "row", "col"))
    if images is not None and np.asarray(images).dtype != np.uint8:
        raise InputError(f"photographs are {np.asarray(images).dtype}; they must be uint8, as the model's images are shown")
    leads = [name for name, given in (("Input", images), ("Rollout", rolled)) if given is not None]
    lines = -(-len(chosen) // _HEADS_IN_A_LINE)
    across = -(-len(chosen) // lines)
    columns = len(leads) + across
    places = [(0, column) for column in range(len(leads))]
    places += [(index // across, len(leads) + index % across) for index in range(len(chosen))]
    height, width = values.shape[2:] if images is None else images.shape[1:3]
    tiles = np.full((len(values), lines, columns, height, width, 3), 255, dtype=np.uint8)
    for index, one in enumerate(values):
        photograph = None if images is None else images[index]
        shown = [] if photograph is None else [photograph]
        shown += [] if rolled is None else [_shown_rollout(rolled[index], photograph)]
        shown += [_heat(one[head], (height, width)) for head in chosen]
        for (line, column), tile in zip(places, shown, strict=True):
            tiles[index, line, column] = tile
    between, named = max(1, round(0.06 * width)), len(values) if lines > 1 else 1
    pixels = columns * (width + between) - between
    if ax is None:
        tallest = (_TALLEST - named * lines * _GAP_INCHES) / (len(values) * lines * (height + between))
        for right in (BAR_INCHES, LOW_BAR_INCHES):
            widest = WIDTHS["icml" if columns <= 3 else "neurips"] - _MARGIN - right
            scale = min(widest / pixels, max(tallest, _LOWEST / height))
            if len(values) * lines * height * scale >= LOW:
                break
    else:
        scale = inches_per_pixel(ax, len(values) * lines * height, pixels)
    below = between if named == 1 else max(between, round(_GAP_INCHES / scale))
    picture = mosaic(tiles.reshape(-1, *tiles.shape[2:]), gap=(below, between), fill=255)
    inches = pixels * scale, picture.shape[0] * scale
    margins = _MARGIN, *bar_margins(inches[1], _BELOW, _NAME_INCHES)
    size = inches[0] + margins[0] + margins[2], inches[1] + margins[1] + margins[3]
    with drawing_axes(ax, size, margins) as axes:
        axes.imshow(picture, aspect="equal")
        bare(axes)
        middle = centres(columns, width, between)
        room = (width + between) * scale
        names = [*(fitting_text(lead, room) for lead in leads), *_head_names(chosen, room)]
        for index in range(named):
            for (line, column), name in zip(places, names, strict=True):
                top = (index * lines + line) * (height + below) - 0.5
                axes.annotate(
                    name, (middle[column], top), (0, 2), textcoords="offset points", ha="center", va="bottom",
                    annotation_clip=False,
                )  # fmt: skip
        bar_of_ends(axes, *inches, ("0", "max"), _bar_label(inches[1]))
    return axes


def _head_names(heads: Sequence[int], inches: float) -> list[str]:
    """What is written above each head's map; the number alone where there is no room for more."""
    names = [f"Head {head}" for head in heads]
    return names if max(map(text_inches, names)) < inches else [str(head) for head in heads]


def _heat(attention: NDArray[Any], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The map in colours, dark at 0 and bright at its maximum, at the size (height, width) of a photograph."""
    rows, cols = (np.arange(pixels) * patches // pixels for pixels, patches in zip(size, attention.shape, strict=True))
    highest = attention.max()
    return as_bytes(_VIRIDIS(attention / (highest if highest > 0 else 1))[rows[:, None], cols, :3])


def _shown_rollout(rollout: NDArray[Any], photograph: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    return _heat(rollout, rollout.shape) if photograph is None else as_bytes(attention_over_black(photograph, rollout))


def _bar_label(height: float) -> str:
    """What is written beside a colour bar of so many inches."""
    return _BAR_LABELS[text_inches(_BAR_LABELS[0]) > height - _ENDS_INCHES]


def _checked_heads(heads: Sequence[int] | None, count: int) -> list[int]:
    chosen = list(range(count)) if heads is None else list(heads)
    if not chosen or not all(0 <= head < count for head in chosen):
        raise InputError(f"heads {chosen} were asked for, but there are heads 0 to {count - 1}; name some of those")
    return chosen


def _check_beside(what: str, given: NDArray[Any] | None, shape: tuple[int | None, ...]) -> None:
    """Raise InputError if something is given and has another shape; None stands for any length from 1 on."""
    if given is None:
        return
    found = np.shape(given)
    if len(found) != len(shape) or any(length != (want or length or 1) for want, length in zip(shape, found, strict=True)):
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise InputError(f"{what} of shape {found} came with the attention maps; they must be ({wanted})")
