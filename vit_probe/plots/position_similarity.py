"""How similar the position embeddings of patches are, as a grid of maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from vit_probe.errors import InputError
from vit_probe.plots.layout import (
    bar_axes,
    centres,
    inches_per_pixel,
    label_across,
    mosaic,
    panel_row,
    say_instead,
    title_inches,
)
from vit_probe.plots.style import WIDTHS, drawing_axes, style

__all__ = ["TITLE", "plot_position_similarities", "plot_position_similarity", "shown_patches"]

TITLE = "Position embedding similarity"
_ALL_SHOWN = 14  # patches a side, up to which every one has its tile
_MOST_TILES = 8
_MARGINS = (0.48, 0.42, 0.58, 0.26)  # left, bottom, right, top of the picture, in inches
_LABEL = 1.1  # inches that an axis label takes
_WIDE = 0.5  # height over width, below which a picture has the whole page
_LONG_BAR = 1.25  # inches from which the label finds room between the bar's ticks
_TALLEST = 8.0
_TOLERANCE = 1e-3
_LARGEST_PANEL = 2.2  # inches of one of several maps
_TITLE_POINTS = 8  # of one of several maps
_GAP, _GAP_WITH_NUMBERS = 0.12, 0.3  # inches between several maps, the latter where each has the numbers of its own rows


def plot_position_similarity(
    similarity: NDArray[Any],
    *,
    tiles: int | None = None,
    title: str = TITLE,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw one tile a patch: its cosine similarity with the position of every patch.

    A side of more than 14 patches is shown at evenly spaced ones, first and last included. Ticks give the row and
    column of the tile's own patch, counted from 1 as in the paper.

    Args:
        similarity: (row, col, row, col), values in [-1, 1]; the grid need not be square.
        tiles: At most so many tiles a side; if None, all up to 14, else 6 to 8, whichever spaces them most evenly.
        title: Above the tiles.
        colorbar: Whether to add the colour bar, beside the axes.
        ax: Where to draw; a new figure of a column's width if None.

    Returns:
        The axes, holding one image: the mosaic, its gaps masked and shown white.

    Raises:
        InputError: If the shape is another, a value is no cosine, or `tiles` is below 2.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7 (centre) and figure 10.
    """
    values = _checked(similarity)
    if tiles is not None and tiles < 2:
        raise InputError(f"cannot show {tiles} tiles a side; give 2 or more, so that the first and the last are among them")
    rows, cols = (shown_patches(size, tiles) for size in values.shape[:2])
    gap = max(1, round(max(values.shape[2:]) / 12))
    picture = mosaic(values[np.ix_(rows, cols)], gap=(gap, gap), fill=np.nan)
    aspect = picture.shape[0] / picture.shape[1]
    left, bottom, right, top = _MARGINS if colorbar else (*_MARGINS[:2], 0.05, _MARGINS[3])
    inches = WIDTHS["neurips" if aspect < _WIDE else "icml"] - left - right
    height = min(inches * aspect, _TALLEST)
    spare = max(0.0, _LABEL - height) / 2  # room for labels longer than a low picture is high
    size = (inches + left + right, height + bottom + top + 2 * spare)
    scale = inches / picture.shape[1] if ax is None else inches_per_pixel(ax, *picture.shape)
    with drawing_axes(ax, size, (left, bottom + spare, right, top + spare)) as axes:
        image = axes.imshow(
            np.ma.masked_invalid(picture),
            cmap=mpl.colormaps["viridis"].with_extremes(bad="white"),
            vmin=-1,
            vmax=1,
            interpolation="nearest",
            aspect="equal",
        )
        axes.spines[:].set_visible(False)
        pitch = (values.shape[2] + gap) * scale, (values.shape[3] + gap) * scale
        axes.set_yticks(*_ticks(rows, values.shape[2], gap, math.ceil(0.15 / pitch[0])))
        axes.set_xticks(*_ticks(cols, values.shape[3], gap, math.ceil(0.19 / pitch[1])))
        axes.set_xlabel("Input patch column")
        axes.set_ylabel("Input patch row")
        axes.set_title(title)
        if colorbar:
            place = bar_axes(axes, picture.shape[1] * scale, picture.shape[0] * scale)
            bar = axes.figure.colorbar(image, cax=place, ticks=[-1, 1])
            bar.set_label("Cosine similarity", labelpad=-7 if picture.shape[0] * scale > _LONG_BAR else 2)
            bar.outline.set_visible(False)
    return axes


def plot_position_similarities(
    maps: Mapping[str, NDArray[Any] | None], *, tiles: int | None = None, figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """Draw the maps of several models, or of one at several times, side by side with one colour bar.

    Args:
        maps: By title (which may have several lines), from left to right, each as for `plot_position_similarity`; None for a
            model whose positions cannot be compared, whose panel then says so.
        tiles: As for `plot_position_similarity`.
        figure: Where to draw, a figure or a part of one; a new one of at most a page's width (6.75 inches) if None.

    Returns:
        The figure; its first axes are the panels, from left to right.

    Raises:
        InputError: If there is no map, or as `plot_position_similarity` does.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 10.
    """
    shapes = {title: _checked(similarity).shape for title, similarity in maps.items() if similarity is not None}
    if not shapes:
        raise InputError(f"there is no map of position similarities to draw among {len(maps)}; give at least one, by title")
    margins = (*_MARGINS[:3], title_inches(maps))
    if figure is None:
        left, bottom, right, top = margins
        across = min((WIDTHS["icml-page"] - left - right) / len(maps), _LARGEST_PANEL)
        down = min(across * max(rows / cols for rows, cols, *_ in shapes.values()), _TALLEST)
        with style():
            new = Figure(figsize=(across * len(maps) + left + right, max(down, _LABEL) + bottom + top))
            return plot_position_similarities(maps, tiles=tiles, figure=new)
    alike = len(set(shapes.values())) == 1
    panels = panel_row(figure, len(maps), margins, gap=_GAP if alike else _GAP_WITH_NUMBERS)
    drawn = [panel for panel, similarity in zip(panels, maps.values(), strict=True) if similarity is not None]
    for panel, (title, similarity) in zip(panels, maps.items(), strict=True):
        if similarity is None:
            say_instead(panel, title, "No positions\nto compare")
        else:
            plot_position_similarity(similarity, tiles=tiles, title=title, colorbar=panel is drawn[-1], ax=panel)
        panel.title.set_fontsize(_TITLE_POINTS)
    for panel in drawn[1:]:
        panel.set_ylabel("")
        if alike:
            panel.tick_params(labelleft=False)
    label_across(drawn, drawn[0].get_xlabel())
    return figure


def _checked(similarity: NDArray[Any]) -> NDArray[np.float64]:
    values = np.asarray(similarity, dtype=np.float64)
    if values.ndim != 4 or values.shape[:2] != values.shape[2:] or 0 in values.shape:
        raise InputError(f"similarity has shape {values.shape}; it must be (row, col, row, col), the same grid twice")
    if not (np.abs(values) <= 1 + _TOLERANCE).all():
        raise InputError(
            f"similarity ranges from {values.min():.4g} to {values.max():.4g}; cosines lie in [-1, 1]: "
            "divide the products of embeddings by their lengths"
        )
    return values


def shown_patches(size: int, tiles: int | None = None) -> NDArray[np.intp]:
    """Indices of the patches shown along a side, first and last among them."""
    if tiles is None:
        even = [count for count in (_MOST_TILES, 7, 6) if (size - 1) % (count - 1) == 0]
        tiles = size if size <= _ALL_SHOWN else (even or [_MOST_TILES])[0]
    return np.linspace(0, size - 1, min(size, tiles)).round().astype(np.intp)


def _ticks(shown: NDArray[np.intp], size: int, gap: int, step: int) -> tuple[NDArray[np.float64], list[str]]:
    """Every `step`-th tile's centre, and the number of its patch, from 1."""
    return centres(len(shown), size, gap)[::step], [str(patch + 1) for patch in shown[::step]]
