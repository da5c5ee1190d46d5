"""The measures: one published idea a module."""

from vit_probe.measures.attention_distance import AttentionDistance, AttentionDistanceResult, mean_attention_distance
from vit_probe.measures.attention_entropy import AttentionEntropy, AttentionEntropyResult, attention_entropy
from vit_probe.measures.class_attention import ClassAttention, ClassAttentionResult, class_attention
from vit_probe.measures.deletion import DeletionResult, deletion
from vit_probe.measures.head_table import head_table
from vit_probe.measures.map_statistics import head_correlation, kept_mass_mask, map_correlation
from vit_probe.measures.overview import Overview, overview
from vit_probe.measures.patch_filters import PatchFiltersResult, convolution_filters, low_frequency_share, patch_filters
from vit_probe.measures.position_similarity import PositionSimilarityResult, position_nearness, position_similarity
from vit_probe.measures.receptive_field import ARCHITECTURES, ReceptiveFieldResult, SlidingLayer, plain_stack, receptive_field
from vit_probe.measures.representation_similarity import (
    RepresentationSimilarity,
    RepresentationSimilarityResult,
    representation_similarity,
)
from vit_probe.measures.rollout import AttentionRollout, AttentionRolloutResult, attention_rollout
from vit_probe.measures.token_norms import TokenNorms, TokenNormsResult, token_norms

__all__ = [
    "ARCHITECTURES",
    "AttentionDistance",
    "AttentionDistanceResult",
    "AttentionEntropy",
    "AttentionEntropyResult",
    "AttentionRollout",
    "AttentionRolloutResult",
    "ClassAttention",
    "ClassAttentionResult",
    "DeletionResult",
    "Overview",
    "PatchFiltersResult",
    "PositionSimilarityResult",
    "ReceptiveFieldResult",
    "RepresentationSimilarity",
    "RepresentationSimilarityResult",
    "SlidingLayer",
    "TokenNorms",
    "TokenNormsResult",
    "attention_entropy",
    "attention_rollout",
    "class_attention",
    "convolution_filters",
    "deletion",
    "head_correlation",
    "head_table",
    "kept_mass_mask",
    "low_frequency_share",
    "map_correlation",
    "mean_attention_distance",
    "overview",
    "patch_filters",
    "plain_stack",
    "position_nearness",
    "position_similarity",
    "receptive_field",
    "representation_similarity",
    "token_norms",
]
