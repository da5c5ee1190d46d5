"""Attention distance and position similarity of a model in several states of training."""

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

_ROW_INCHES = (2.5, 1.8)


def plot_training_time(
    frames: Mapping[str, pd.DataFrame], similarities: Mapping[str, Float[ndarray, "row col row col"] | None]
) -> Figure:
    """Draw one column per state of a model: attention distance above, position similarity below.

    Args:
        frames: Tables as for `plot_attention_distances`, by title, from left to right.
        similarities: Maps as for `plot_position_similarities`, by title.

    Returns:
        A figure of a page's width (6.75 inches).

    Raises:
        InputError: If `plot_attention_distances` or `plot_position_similarities` raises it.

    Examples:
        >>> import numpy as np
        >>> import pandas as pd
        >>> heads = pd.DataFrame({"layer": [0, 0], "head": [0, 1], "distance": [15.0, 40.0], "std": 2.0, "patch_mass": 0.9})
        >>> heads = heads.assign(uniform_distance=41.7, num_images=8)
        >>> figure = plot_training_time({"epoch 1": heads}, {"epoch 1": np.ones((2, 2, 2, 2))})
        >>> [ax.get_ylabel() for ax in figure.axes[:2]]
        ['Mean attention distance (pixels)', 'Input patch row']

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figures 7 (right) and 10.
    """
    with style():
        figure = Figure(figsize=(WIDTHS["icml-page"], sum(_ROW_INCHES)))
        (upper,), (lower,) = figure.subfigures(2, 1, height_ratios=_ROW_INCHES, squeeze=False)
        plot_attention_distances(frames, figure=upper)
        plot_position_similarities(similarities, figure=lower)
    return figure
