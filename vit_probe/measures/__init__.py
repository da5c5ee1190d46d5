"""The measures: one published idea a module."""

from vit_probe.measures.attention_distance import AttentionDistance, AttentionDistanceResult, mean_attention_distance
from vit_probe.measures.attention_entropy import AttentionEntropy, AttentionEntropyResult, attention_entropy
from vit_probe.measures.patch_filters import PatchFiltersResult, patch_filters
from vit_probe.measures.position_similarity import PositionSimilarityResult, position_similarity
from vit_probe.measures.rollout import AttentionRollout, AttentionRolloutResult, attention_rollout

__all__ = [
    "AttentionDistance",
    "AttentionDistanceResult",
    "AttentionEntropy",
    "AttentionEntropyResult",
    "AttentionRollout",
    "AttentionRolloutResult",
    "PatchFiltersResult",
    "PositionSimilarityResult",
    "attention_entropy",
    "attention_rollout",
    "mean_attention_distance",
    "patch_filters",
    "position_similarity",
]
