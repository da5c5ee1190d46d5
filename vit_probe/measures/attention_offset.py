"""Attention offset: in which direction a head attends, and its attention aligned to the query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from vit_probe.measures.base.head_measure import head_measure
from vit_probe.measures.base.per_head import HeadResult
from vit_probe.measures.base.reduce import PatchAttention, QuerySum

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["AttentionOffsetResult", "attention_offset"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AttentionOffsetResult(HeadResult):
    """Mean offset of every head's attention, and its attention aligned to the query.

    The fields are those of `HeadResult`; its values are `dx` and `dy`, (layer, head), pixels, and `aligned`,
    (layer, head, 2 rows - 1, 2 cols - 1).
    """

    @property
    def length(self) -> Float[np.ndarray, "layer head"]:
        """(layer, head), pixels, length of the mean offset vector."""
        return np.hypot(self.values["dx"], self.values["dy"])

    def to_dataframe(self, *, per_image: bool = False) -> pd.DataFrame:
        """As that of `HeadResult`, with the length of the mean offset vector; of single images, of theirs."""
        frame = super().to_dataframe(per_image=per_image)
        frame.insert(list(frame).index("dy") + 1, "length", np.hypot(frame["dx"], frame["dy"]))
        return frame

    def plot(
        self,
        *,
        ax: Axes | None = None,
        kind: Literal["aligned", "depth", "sorted"] = "aligned",
        layers: Sequence[int] | None = None,
        spread: bool = False,
    ) -> Axes:
        """Draw the aligned attention of every head, or its mean offset to the right.

        Args:
            ax: Where to draw; a new figure if None.
            kind: `aligned` draws one map per head, one row per layer, with a cross at the query; `depth` and `sorted` draw dx
                as those of `HeadResult` do.
            layers: Which layers to draw, from 0; if None, all (of sorted heads the first two and the last two).
            spread: Add error bars of one standard deviation over images, against depth.
        """
        if kind != "aligned":
            return super().plot(ax=ax, kind=kind, layers=layers, spread=spread)
        from vit_probe.plots.attention_offset import plot_aligned_attention

        return plot_aligned_attention(self.values["aligned"], layers=layers, ax=ax)


@head_measure(unit="pixels", reference="arXiv:2212.03862", result=AttentionOffsetResult)
def attention_offset(attention: PatchAttention) -> dict[str, Tensor | QuerySum]:
    """Mean offset vector of attention to patches, and attention aligned to the query, for every layer and head.

    For layer l and head h the weights of each query patch on patches are rescaled to sum to 1. The mean offset is the mean over
    images and query patches i of sum_j a_ij (x_j - x_i), in pixels; it is near 0 for a head that attends evenly around the
    query, and long for one that always attends to, say, the patch on the left. The aligned attention is the mean map with the
    query moved to the centre: entry (rows - 1 + v, cols - 1 + u) is the mean attention to the patch v rows below and u columns
    right of the query, 0 where that lies outside the image. It sums to 1.

    The authors' code gives offsets in units of half the side of the aligned map, and divides that map by the number of batches
    where it should divide by the number of images; up to that factor the numbers agree.

    Returns:
        An `AttentionOffsetResult`: `dx` and `dy` (pixels; right and down are positive) with their spread over images,
        `aligned`, and `length`, the length of the mean offset. Queries whose weights on patches round to 0 are left out;
        `excluded` is their share.

    Raises:
        InputError: If the images cannot be used, the grid does not fit the attention, or no attention is seen.

    References:
        Walmer et al. 2023, Teaching Matters: Investigating the Role of Supervision in Vision Transformers, arXiv:2212.03862,
        section 4 (aligned aggregated attention maps).

    Examples:
        >>> import torch
        >>> from vit_probe import attention_offset, load_model
        >>> result = attention_offset(load_model("demo"), torch.zeros(1, 3, 64, 64))
        >>> result.dx.shape, result.aligned.shape
        ((9, 6), (9, 6, 15, 15))
    """
    weights, has_mass = attention.renormalized, attention.has_patch_mass
    return {
        "dx": attention.sum_where((weights * attention.dx).sum(dim=-1), has_mass),
        "dy": attention.sum_where((weights * attention.dy).sum(dim=-1), has_mass),
        "aligned": attention.align(weights, has_mass),
        "excluded": 1 - has_mass.to(weights),
    }
