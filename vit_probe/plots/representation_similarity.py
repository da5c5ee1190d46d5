"""How alike the representations of layers are, as maps of layer against layer."""

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

_TICK_INCHES = 0.24  # what a number of two digits needs
_BAR_INCHES = 0.1
_BAR_LABEL = "Similarity (linear CKA)"
_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class SimilarityPanel:
    """One of several maps on a sheet.

    Args:
        similarity: (layer, other_layer), as for `plot_representation_similarity`.
        title: Above the map.
        down: Label of the axis of layers, on the left.
        across: Label of the axis of other layers, below.
    """

    similarity: NDArray[Any]
    title: str = ""
    down: str = "Layer"
    across: str = "Layer"


def plot_representation_similarity(
    similarity: NDArray[Any],
    *,
    title: str = "",
    down: str = "Layer",
    across: str = "Layer",
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw the similarity of all pairs of layers, the first ones at the lower left.

    The darkest colour is not always that of 0, so that layers which are nearly alike can be told apart: it is that of the
    largest multiple of 0.1 that is not above the least similarity, but 0 at the least and 0.9 at most. The brightest is that
    of 1. The colour bar tells both.

    Args:
        similarity: (layer, other_layer), at most 1; what is below 0 is shown as 0.
        title: Above the map.
        down: Label of the axis of layers, on the left.
        across: Label of the axis of other layers, below.
        colorbar: Whether to add the colour bar, beside the axes.
        ax: Where to draw; a new figure of a column's width if None.

    Returns:
        The axes, holding one image.

    Raises:
        InputError: If the shape is another, or a value is not finite or above 1.

    References:
        Raghu et al. 2021, arXiv:2108.08810, figures 1 and 2.
    """
    values = _checked(similarity)
    with drawing_axes(ax, (WIDTHS["icml"], 2.6)) as axes:
        image = _draw(axes, SimilarityPanel(values, title, down, across), _darkest(values.min()))
        if colorbar:
            _bar(axes, image)
    return axes


def plot_representation_similarities(panels: Sequence[SimilarityPanel], *, figure: Figure | None = None) -> Figure:
    """Draw several maps side by side, with one colour bar.

    All have the same colours, as `plot_representation_similarity` chooses them for the least similarity of all.

    Args:
        panels: From left to right.
        figure: Where to draw; a new one of a page's width (6.75 inches) if None.

    Returns:
        The figure; its first axes are the panels.

    Raises:
        InputError: If there is no panel, or as `plot_representation_similarity` does.

    References:
        Raghu et al. 2021, arXiv:2108.08810, figures 1 and 2.
    """
    if not panels:
        raise InputError("there is no panel to draw; give one at least")
    if figure is None:
        with style():
            width = WIDTHS["icml-page"]
            figure = Figure(figsize=(width, 0.64 + (width - 1.65) / max(len(panels), 2)), layout="constrained")
            return plot_representation_similarities(panels, figure=figure)
    darkest = _darkest(min(_checked(panel.similarity).min() for panel in panels))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    images = [_draw(one, panel, darkest) for one, panel in zip(axes, panels, strict=True)]
    _bar(axes[-1], images[-1])
    return figure


def _checked(similarity: NDArray[Any]) -> NDArray[np.float64]:
    values = np.asarray(similarity, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise InputError(f"similarity has shape {values.shape}; it must be (layer, other_layer)")
    if not (values <= 1 + _TOLERANCE).all() or not np.isfinite(values).all():
        raise InputError(
            f"similarity ranges from {values.min():.4g} to {values.max():.4g}, and must be finite and at most 1; pass the "
            "`similarity` of what representation_similarity returns"
        )
    return values


def _darkest(least: float) -> float:
    """The similarity from which colours rise, where this is the least to be shown."""
    return min(max(math.floor(10 * least + _TOLERANCE), 0), 9) / 10


def _draw(axes: Axes, panel: SimilarityPanel, darkest: float) -> AxesImage:
    values = np.asarray(panel.similarity, dtype=np.float64)
    image = axes.imshow(values, origin="lower", vmin=darkest, vmax=1, cmap="viridis", interpolation="nearest", aspect="equal")
    for axis, length, label in ((axes.yaxis, values.shape[0], panel.down), (axes.xaxis, values.shape[1], panel.across)):
        axis.set_major_locator(MultipleLocator(math.ceil(_TICK_INCHES * length / min(axes_inches(axes)))))
        axis.set_label_text(label)
    axes.set_title(panel.title)
    axes.spines[:].set_visible(False)
    return image


def _bar(axes: Axes, image: AxesImage) -> None:
    bar: Any = bar_beside(axes, image, _BAR_INCHES, ticks=MaxNLocator(5, steps=[1, 2, 5, 10]))
    bar.set_label(_BAR_LABEL)
    bar.outline.set_visible(False)
