"""The three panels of the ViT paper's figure 7 on one sheet."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vit_probe.plots.attention_distance import plot_attention_distance
from vit_probe.plots.layout import say_instead
from vit_probe.plots.patch_filters import plot_patch_filters
from vit_probe.plots.position_similarity import TITLE, plot_position_similarity
from vit_probe.plots.style import WIDTHS, style

__all__ = ["plot_figure7"]

_HEIGHT = 2.4
_TITLE_POINTS = 8  # as large as the labels: a third of a page holds no more


def plot_figure7(
    filters: NDArray[Any],
    similarity: NDArray[Any] | None,
    frame: pd.DataFrame,
    *,
    similarity_title: str = TITLE,
    figure: Figure | None = None,
) -> Figure:
    """Draw patch filters, position similarity and attention distance side by side.

    Args:
        filters: (filter, channel, row, col), as for `plot_patch_filters`.
        similarity: (row, col, row, col), as for `plot_position_similarity`; None for a model that has none, whose panel then
            says so.
        frame: One row a head, as for `plot_attention_distance`.
        similarity_title: Above the panel of the similarity.
        figure: Where to draw; a new one of a page's width (6.75 inches) if None.

    Returns:
        The figure; its first three axes are the panels, from left to right.

    Raises:
        InputError: As the functions of the panels do.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7.
    """
    if figure is None:
        with style():
            figure = Figure(figsize=(WIDTHS["icml-page"], _HEIGHT))
            figure.set_layout_engine("constrained", w_pad=0.05, h_pad=0.03)
            return plot_figure7(filters, similarity, frame, similarity_title=similarity_title, figure=figure)
    left, centre, right = figure.subplots(1, 3, width_ratios=(1.12, 1.06, 1.1))
    components = "principal component" if len(filters) == 1 else f"{len(filters)} principal components"
    plot_patch_filters(filters, title=f"RGB embedding filters\n(first {components})", ax=left)
    if similarity is None:
        say_instead(centre, similarity_title, "Positions of this model\ncannot be compared.")
    else:
        plot_position_similarity(similarity, title=similarity_title, ax=centre)
    plot_attention_distance(frame, ax=right)
    for panel in (left, centre):
        panel.title.set_fontsize(_TITLE_POINTS)
    return figure
