"""Similarity of the representations of layers, as maps of layer against layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, MultipleLocator
from numpy.typing import NDArray

from vit_probe.errors import InputError
from vit_probe.plots.layout import axes_inches, bar_beside
from vit_probe.plots.style import WIDTHS, drawing_axes, style

__all__ = ["SimilarityPanel", "plot_representation_similarities", "plot_representation_similarity"]

_TICK_INCHES = 0.24  # fits a number of two digits
_BAR_INCHES = 0.1
_BAR_LABEL = "Similarity (linear CKA)"
_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class SimilarityPanel:
    """One map of `plot_representation_similarities`.

    Args:
        similarity: (layer, other_layer), as for `plot_representation_similarity`.
        title: Title above the map.
        ylabel: Label of the vertical axis, of layers.
        xlabel: Label of the horizontal axis, of other layers.

    Examples:
        >>> import numpy as np
        >>> SimilarityPanel(np.eye(3), "ViT").ylabel
        'Layer'
    """

    similarity: NDArray[Any]
    title: str = ""
    ylabel: str = "Layer"
    xlabel: str = "Layer"


def plot_representation_similarity(
    similarity: NDArray[Any],
    *,
    title: str = "",
    ylabel: str = "Layer",
    xlabel: str = "Layer",
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw the similarity of all pairs of layers, with the first layers at the lower left.

    So that similar layers remain distinguishable, colours do not always start at 0: they start at the smallest similarity,
    rounded down to a multiple of 0.1 and limited to [0, 0.9]. They always end at 1.

    Args:
        similarity: (layer, other_layer), at most 1; values below 0 are drawn as 0.
        title: Title above the map.
        ylabel: Label of the vertical axis, of layers.
        xlabel: Label of the horizontal axis, of other layers.
        colorbar: Whether to draw a colour bar beside the axes.
        ax: Axes to draw on; if None, a new figure of a column's width.

    Returns:
        The axes, holding one image.

    Raises:
        InputError: If `similarity` is not a matrix, or a value is above 1 or not finite.

    Examples:
        >>> import numpy as np
        >>> ax = plot_representation_similarity(np.array([[1.0, 0.85], [0.85, 1.0]]))
        >>> ax.images[0].get_clim()
        (0.8, 1.0)

    References:
        Raghu et al. 2021, arXiv:2108.08810, figures 1 and 2.
    """
    values = _checked(similarity)
    with drawing_axes(ax, (WIDTHS["icml"], 2.6)) as axes:
        image = _draw(axes, SimilarityPanel(values, title, ylabel, xlabel), _lowest_colour(values.min()))
        if colorbar:
            _bar(axes, image)
    return axes


def plot_representation_similarities(panels: Sequence[SimilarityPanel], *, figure: Figure | None = None) -> Figure:
    """Draw several maps side by side, with one colour bar.

    All maps share their colours, which `plot_representation_similarity` would choose for the smallest similarity of all maps.

    Args:
        panels: Maps from left to right.
        figure: Figure to draw on; if None, a new one of a page's width (6.75 inches).

    Returns:
        The figure; its first axes are the panels.

    Raises:
        InputError: If there is no panel, or `plot_representation_similarity` cannot draw one of them.

    Examples:
        >>> import numpy as np
        >>> figure = plot_representation_similarities([SimilarityPanel(np.eye(3), "ViT"), SimilarityPanel(np.eye(5), "CNN")])
        >>> [ax.get_title() for ax in figure.axes]
        ['ViT', 'CNN']

    References:
        Raghu et al. 2021, arXiv:2108.08810, figures 1 and 2.
    """
    if not panels:
        raise InputError("there are no panels to draw; pass at least one")
    if figure is None:
        with style():
            width = WIDTHS["icml-page"]
            figure = Figure(figsize=(width, 0.64 + (width - 1.65) / max(len(panels), 2)), layout="constrained")
            return plot_representation_similarities(panels, figure=figure)
    lowest = _lowest_colour(min(_checked(panel.similarity).min() for panel in panels))
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    images = [_draw(axes, panel, lowest) for axes, panel in zip(row, panels, strict=True)]
    _bar(row[-1], images[-1])
    return figure


def _checked(similarity: NDArray[Any]) -> NDArray[np.float64]:
    values = np.asarray(similarity, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise InputError(f"similarity has shape {values.shape}; it must be (layer, other_layer)")
    if not (values <= 1 + _TOLERANCE).all() or not np.isfinite(values).all():
        raise InputError(
            f"similarity ranges from {values.min():.4g} to {values.max():.4g}; it must be finite and at most 1, as is the "
            "`similarity` of a result of representation_similarity"
        )
    return values


def _lowest_colour(smallest: float) -> float:
    """Similarity at which colours start, if `smallest` is the smallest similarity drawn."""
    return min(max(math.floor(10 * smallest + _TOLERANCE), 0), 9) / 10


def _draw(axes: Axes, panel: SimilarityPanel, lowest: float) -> AxesImage:
    values = np.asarray(panel.similarity, dtype=np.float64)
    image = axes.imshow(values, origin="lower", vmin=lowest, vmax=1, cmap="viridis", interpolation="nearest", aspect="equal")
    for axis, length, label in ((axes.yaxis, values.shape[0], panel.ylabel), (axes.xaxis, values.shape[1], panel.xlabel)):
        axis.set_major_locator(MultipleLocator(math.ceil(_TICK_INCHES * length / min(axes_inches(axes)))))
        axis.set_label_text(label)
    axes.set_title(panel.title)
    axes.spines[:].set_visible(False)
    return image


def _bar(axes: Axes, image: AxesImage) -> None:
    bar: Any = bar_beside(axes, image, _BAR_INCHES, ticks=MaxNLocator(5, steps=[1, 2, 5, 10]))
    bar.set_label(_BAR_LABEL)
    bar.outline.set_visible(False)
