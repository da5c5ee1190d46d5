"""Similarity of the position embeddings of patches, as a grid of maps."""

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
    inches_per_pixel,
    label_across,
    mosaic,
    panel_row,
    show_message,
    tile_centres,
    title_inches,
)
from vit_probe.plots.style import WIDTHS, drawing_axes, style

__all__ = ["TITLE", "plot_position_similarities", "plot_position_similarity", "shown_patches"]

TITLE = "Position embedding similarity"
_MAX_SIDE_IN_FULL = 14  # patches per side; larger grids show evenly spaced patches
_MAX_TILES = 8  # tiles per side of those larger grids
_MARGINS = (0.48, 0.42, 0.58, 0.26)  # left, bottom, right, top of the picture, in inches
_LABEL_INCHES = 1.1  # length of an axis label
_WIDE_ASPECT = 0.5  # height over width; pictures below it get the full width of the page
_LONG_BAR_INCHES = 1.25  # minimum length of a colour bar whose label fits between its two ticks
_MAX_HEIGHT = 8.0  # inches
_TOLERANCE = 1e-3  # by which rounding may take a cosine out of [-1, 1]

# Several maps side by side
_MAX_PANEL_INCHES = 2.2
_PANEL_TITLE_POINTS = 8
_PANEL_GAP, _PANEL_GAP_WITH_NUMBERS = 0.12, 0.3  # inches; the latter where each map has its own row numbers


def plot_position_similarity(
    similarity: NDArray[Any],
    *,
    tiles: int | None = None,
    title: str = TITLE,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw one tile per patch: the cosine similarity of its position embedding with that of every patch.

    If a side has more than 14 patches, evenly spaced patches are shown, including the first and the last. Ticks give the row
    and column of the tile's own patch, counted from 1 as in the paper.

    Args:
        similarity: (row, col, row, col), values in [-1, 1]; the grid need not be square.
        tiles: Maximum number of tiles per side; if None, all patches of a side of up to 14, else 6 to 8, whichever number
            spaces the tiles most evenly.
        title: Title above the tiles.
        colorbar: Whether to draw a colour bar beside the axes.
        ax: Axes to draw on; if None, a new figure of a column's width.

    Returns:
        The axes, holding one image: the mosaic, with masked gaps, which are white.

    Raises:
        InputError: If `similarity` has another shape or values that are not cosines, or `tiles` is below 2.

    Examples:
        >>> import numpy as np
        >>> embeddings = np.random.default_rng(0).normal(size=(16, 8))
        >>> embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        >>> ax = plot_position_similarity((embeddings @ embeddings.T).reshape(4, 4, 4, 4))
        >>> ax.get_xlabel(), [text.get_text() for text in ax.get_xticklabels()]
        ('Input patch column', ['1', '2', '3', '4'])

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7 (centre) and figure 10.
    """
    values = _checked(similarity)
    if tiles is not None and tiles < 2:
        raise InputError(f"cannot draw {tiles} tiles per side; pass 2 or more, to show at least the first and the last patch")
    rows, cols = (shown_patches(size, tiles) for size in values.shape[:2])
    gap = max(1, round(max(values.shape[2:]) / 12))
    picture = mosaic(values[np.ix_(rows, cols)], gap=(gap, gap), fill=np.nan)
    aspect = picture.shape[0] / picture.shape[1]
    left, bottom, right, top = _MARGINS if colorbar else (*_MARGINS[:2], 0.05, _MARGINS[3])
    inches = WIDTHS["neurips" if aspect < _WIDE_ASPECT else "icml"] - left - right
    height = min(inches * aspect, _MAX_HEIGHT)
    overhang = max(0.0, _LABEL_INCHES - height) / 2  # of labels that are longer than a low picture is high
    size = (inches + left + right, height + bottom + top + 2 * overhang)
    scale = inches / picture.shape[1] if ax is None else inches_per_pixel(ax, *picture.shape)
    with drawing_axes(ax, size, (left, bottom + overhang, right, top + overhang)) as axes:
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
            bar.set_label("Cosine similarity", labelpad=-7 if picture.shape[0] * scale > _LONG_BAR_INCHES else 2)
            bar.outline.set_visible(False)
    return axes


def plot_position_similarities(
    maps: Mapping[str, NDArray[Any] | None], *, tiles: int | None = None, figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """Draw the maps of several models, or of several states of one, side by side with one colour bar.

    Args:
        maps: (row, col, row, col), as for `plot_position_similarity`, by title, from left to right. A title may have several
            lines. None stands for a model without position embeddings to compare, whose panel says so.
        tiles: As for `plot_position_similarity`.
        figure: Figure or subfigure to draw on; if None, a new figure of at most a page's width (6.75 inches).

    Returns:
        The figure; its first axes are the panels, from left to right.

    Raises:
        InputError: If there is no map, or `plot_position_similarity` cannot draw one of them.

    Examples:
        >>> import numpy as np
        >>> figure = plot_position_similarities({"epoch 0": np.zeros((2, 2, 2, 2)), "epoch 9": np.ones((2, 2, 2, 2))})
        >>> [ax.get_title() for ax in figure.axes]
        ['epoch 0', 'epoch 9']

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 10.
    """
    shapes = {title: _checked(similarity).shape for title, similarity in maps.items() if similarity is not None}
    if not shapes:
        raise InputError(
            f"none of the {len(maps)} models has a map of position similarities to draw; pass at least one, by title"
        )
    margins = (*_MARGINS[:3], title_inches(maps))
    if figure is None:
        left, bottom, right, top = margins
        width = min((WIDTHS["icml-page"] - left - right) / len(maps), _MAX_PANEL_INCHES)
        height = min(width * max(rows / cols for rows, cols, *_ in shapes.values()), _MAX_HEIGHT)
        with style():
            new = Figure(figsize=(width * len(maps) + left + right, max(height, _LABEL_INCHES) + bottom + top))
            return plot_position_similarities(maps, tiles=tiles, figure=new)
    same_grid = len(set(shapes.values())) == 1
    panels = panel_row(figure, len(maps), margins, gap=_PANEL_GAP if same_grid else _PANEL_GAP_WITH_NUMBERS)
    drawn = [panel for panel, similarity in zip(panels, maps.values(), strict=True) if similarity is not None]
    for panel, (title, similarity) in zip(panels, maps.items(), strict=True):
        if similarity is None:
            show_message(panel, title, "No positions\nto compare")
        else:
            plot_position_similarity(similarity, tiles=tiles, title=title, colorbar=panel is drawn[-1], ax=panel)
        panel.title.set_fontsize(_PANEL_TITLE_POINTS)
    for panel in drawn[1:]:
        panel.set_ylabel("")
        if same_grid:
            panel.tick_params(labelleft=False)
    label_across(drawn, drawn[0].get_xlabel())
    return figure


def _checked(similarity: NDArray[Any]) -> NDArray[np.float64]:
    values = np.asarray(similarity, dtype=np.float64)
    if values.ndim != 4 or values.shape[:2] != values.shape[2:] or 0 in values.shape:
        raise InputError(f"similarity has shape {values.shape}; it must be (row, col, row, col), the same grid twice")
    if not (np.abs(values) <= 1 + _TOLERANCE).all():
        raise InputError(
            f"similarity ranges from {values.min():.4g} to {values.max():.4g}, but cosines lie in [-1, 1]; "
            "divide the dot products by the norms of the embeddings"
        )
    return values


def shown_patches(size: int, tiles: int | None = None) -> NDArray[np.intp]:
    """Indices of the patches shown along a side, including the first and the last."""
    if tiles is None:
        even = [count for count in (_MAX_TILES, 7, 6) if (size - 1) % (count - 1) == 0]
        tiles = size if size <= _MAX_SIDE_IN_FULL else (even or [_MAX_TILES])[0]
    return np.linspace(0, size - 1, min(size, tiles)).round().astype(np.intp)


def _ticks(shown: NDArray[np.intp], size: int, gap: int, step: int) -> tuple[NDArray[np.float64], list[str]]:
    """Centre of every `step`-th tile, and the number of its patch, from 1."""
    return tile_centres(len(shown), size, gap)[::step], [str(patch + 1) for patch in shown[::step]]
