"""Plots of what the measures return: tables and arrays in, `Axes` out.

Every function draws on the axes that it is given, or on a new figure of the size of a journal's column, and returns the axes.
None of them computes a measure, saves or shows a figure, or changes matplotlib's global state.
"""

from __future__ import annotations

from vit_probe.plots.attention_distance import plot_attention_distance, plot_attention_distances
from vit_probe.plots.attention_entropy import plot_attention_entropy, plot_entropy_and_distance, plot_entropy_sheet
from vit_probe.plots.attention_offset import plot_aligned_attention
from vit_probe.plots.class_attention import plot_class_attention
from vit_probe.plots.comparison import Panel, plot_comparison, plot_range
from vit_probe.plots.deletion import plot_deletion
from vit_probe.plots.figure7 import plot_figure7
from vit_probe.plots.patch_filters import plot_filter_panels, plot_patch_filters
from vit_probe.plots.per_head import plot_heads, plot_sorted_heads
from vit_probe.plots.per_layer import plot_layers
from vit_probe.plots.position_similarity import plot_position_similarities, plot_position_similarity
from vit_probe.plots.receptive_field import plot_attention_beside_convolutions, plot_receptive_field
from vit_probe.plots.representation_similarity import (
    SimilarityPanel,
    plot_representation_similarities,
    plot_representation_similarity,
)
from vit_probe.plots.rollout import attention_over_black, plot_rollout
from vit_probe.plots.style import FORMATS, WIDTHS, figure_size, save_figure, style
from vit_probe.plots.token_norms import plot_token_norms
from vit_probe.plots.training_time import plot_training_time

__all__ = [
    "FORMATS",
    "WIDTHS",
    "Panel",
    "SimilarityPanel",
    "attention_over_black",
    "figure_size",
    "plot_aligned_attention",
    "plot_attention_beside_convolutions",
    "plot_attention_distance",
    "plot_attention_distances",
    "plot_attention_entropy",
    "plot_class_attention",
    "plot_comparison",
    "plot_deletion",
    "plot_entropy_and_distance",
    "plot_entropy_sheet",
    "plot_figure7",
    "plot_filter_panels",
    "plot_heads",
    "plot_layers",
    "plot_patch_filters",
    "plot_position_similarities",
    "plot_position_similarity",
    "plot_range",
    "plot_receptive_field",
    "plot_representation_similarities",
    "plot_representation_similarity",
    "plot_rollout",
    "plot_sorted_heads",
    "plot_token_norms",
    "plot_training_time",
    "save_figure",
    "style",
]
