"""Drawings of what the measures return: arrays in, `Axes` out.

Every function draws on the axes it is given, or on a new figure of a real column's size, and returns the axes.
None of them computes a measure, saves, shows or changes matplotlib's global state.
"""

from __future__ import annotations

from vit_probe.plots.attention_distance import plot_attention_distance, plot_sorted_heads
from vit_probe.plots.figure7 import plot_figure7
from vit_probe.plots.patch_filters import plot_patch_filters
from vit_probe.plots.position_similarity import plot_position_similarity
from vit_probe.plots.rollout import attention_over_black, plot_rollout
from vit_probe.plots.style import FORMATS, WIDTHS, figure_size, save_figure, style

__all__ = [
    "FORMATS",
    "WIDTHS",
    "attention_over_black",
    "figure_size",
    "plot_attention_distance",
    "plot_figure7",
    "plot_patch_filters",
    "plot_position_similarity",
    "plot_rollout",
    "plot_sorted_heads",
    "save_figure",
    "style",
]
