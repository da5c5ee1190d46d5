"""The three panels of figure 7 of the ViT paper."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vit_probe.plots.attention_distance import plot_attention_distance
from vit_probe.plots.layout import show_message
from vit_probe.plots.patch_filters import plot_patch_filters
from vit_probe.plots.position_similarity import TITLE, plot_position_similarity
from vit_probe.plots.style import WIDTHS, style

__all__ = ["plot_figure7"]

_HEIGHT = 2.4  # inches
_TITLE_POINTS = 8  # larger titles do not fit a third of the page


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
        similarity: (row, col, row, col), as for `plot_position_similarity`; None if the model has no position embeddings to
            compare, in which case the panel says so.
        frame: One row per head, as for `plot_attention_distance`.
        similarity_title: Title of the panel of position similarity.
        figure: Figure to draw on; if None, a new one of a page's width (6.75 inches).

    Returns:
        The figure; its first three axes are the panels, from left to right.

    Raises:
        InputError: If the function of a panel raises it.

    Examples:
        >>> import numpy as np
        >>> import pandas as pd
        >>> heads = pd.DataFrame({"layer": [0, 0], "head": [0, 1], "distance": [15.0, 40.0], "std": 2.0, "patch_mass": 0.9})
        >>> heads = heads.assign(uniform_distance=41.7, num_images=8)
        >>> figure = plot_figure7(np.random.default_rng(0).normal(size=(28, 3, 8, 8)), np.ones((4, 4, 4, 4)), heads)
        >>> [ax.get_xlabel() for ax in figure.axes[:3]]
        ['', 'Input patch column', 'Network depth (layer)']

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
        show_message(centre, similarity_title, "Positions of this model\ncannot be compared.")
    else:
        plot_position_similarity(similarity, title=similarity_title, ax=centre)
    plot_attention_distance(frame, ax=right)
    for panel in (left, centre):
        panel.title.set_fontsize(_TITLE_POINTS)
    return figure
