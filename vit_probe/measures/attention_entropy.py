"""Attention entropy: over how many tokens a head spreads its attention, and what share goes to prefix tokens and to itself."""

from __future__ import annotations

import torch
from torch import Tensor

from vit_probe.measures.base.head_measure import head_measure
from vit_probe.measures.base.reduce import PatchAttention

__all__ = ["attention_entropy"]


@head_measure(unit="nats", reference="Shannon 1948", command="entropy")
def attention_entropy(attention: PatchAttention) -> dict[str, Tensor]:
    """Shannon entropy of each query patch's attention to all tokens, in nats, for every layer and head.

    For layer l and head h: the mean over images and query patches i of - sum_j a_ij log a_ij, j over all tokens, prefix tokens
    included (in a layer that attends within windows, over those of the window of i). Prefix tokens are not queries.

    Returns:
        A `HeadResult`: `entropy` (nats) with its spread over images; `prefix_mass` and `self_mass`, the shares of attention
        that go to prefix tokens (to padding, in windows) and to the query itself; `uniform_entropy`, the entropy of a head that
        attends equally to all tokens.

    Raises:
        InputError: If the images cannot be used, the grid does not fit the attention, or no attention is seen.

    References:
        Shannon 1948, A Mathematical Theory of Communication. As a measure of a head's attention: Clark et al. 2019,
        arXiv:1906.04341, section 3.3; of a Vision Transformer's training: Zhai et al. 2023, arXiv:2303.06296.

    Examples:
        >>> from vit_probe import attention_entropy, load_model
        >>> result = attention_entropy(load_model("demo"), torch.zeros(1, 3, 64, 64))
        >>> result.entropy.shape, round(float(result.uniform_entropy[0]), 2)
        ((9, 6), 4.17)
    """
    weights = attention.weights
    logarithms = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()  # 0 log 0 is 0
    return {
        "entropy": -(weights * logarithms).sum(dim=-1),
        "prefix_mass": attention.to_prefix.sum(dim=-1),
        "self_mass": attention.to_self,
    }
