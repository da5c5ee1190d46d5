"""What training does to a model: attention distance above, position similarity below, from state to state."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from numpy import ndarray

from vit_probe.plots.attention_distance import plot_attention_distances
from vit_probe.plots.position_similarity import plot_position_similarities
from vit_probe.plots.style import WIDTHS, style

__all__ = ["plot_training_time"]

_INCHES = (2.5, 1.8)  # heights of the two rows


def plot_training_time(
    frames: Mapping[str, pd.DataFrame], similarities: Mapping[str, Float[ndarray, "row col row col"] | None]
) -> Figure:
    """Draw a column a state of a model: attention distance above, position similarity below.

    Args:
        frames: Tables of `plot_attention_distance` by title, from left to right.
        similarities: Maps of `plot_position_similarities` by title.

    Returns:
        A figure of a page's width (6.75 inches).

    Raises:
        InputError: As `plot_attention_distances` and `plot_position_similarities` do.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figures 7 (right) and 10.
    """
    with style():
        figure = Figure(figsize=(WIDTHS["icml-page"], sum(_INCHES)))
        (above,), (below,) = figure.subfigures(2, 1, height_ratios=_INCHES, squeeze=False)
        plot_attention_distances(frames, figure=above)
        plot_position_similarities(similarities, figure=below)
    return figure
