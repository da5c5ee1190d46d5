"""Attention entropy: how many tokens a head spreads its attention over, and what part falls on prefix tokens and on itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor, nn

from vit_probe.data.preprocessing import Preprocessing
from vit_probe.data.stream import Images
from vit_probe.errors import InputError
from vit_probe.measures.base.per_head import PerHead, head_frame, layer_summary
from vit_probe.measures.base.reduce import PatchQueries, RowDots
from vit_probe.results import Result
from vit_probe.runner.run import AttentionRun
from vit_probe.tokens.grid import TokenGrid, Windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["AttentionEntropy", "AttentionEntropyResult", "attention_entropy"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AttentionEntropyResult(Result):
    """Entropy of every head's attention, and the parts that fall on prefix tokens and on the query itself.

    Args:
        entropy: (layer, head), nats, mean over images and query patches; NaN where a layer has fewer heads than others.
        std: (layer, head), nats, standard deviation over images of an image's mean (n - 1; NaN for one image).
        confidence: (layer, head), nats, half the width of the 95 % confidence interval of the mean over all images that these
            are drawn from (Student's t; NaN for one image).
        prefix_mass: (layer, head), the part of patch queries' attention on prefix tokens (and on padding, in windows).
        self_mass: (layer, head), the part of patch queries' attention on themselves.
        uniform_entropy: (layer), nats, of attention to all tokens of the sequence or window alike, padding included.
        modules: Path of each layer's module.
        num_images: Images averaged over.
    """

    entropy: np.ndarray
    std: np.ndarray
    confidence: np.ndarray
    prefix_mass: np.ndarray
    self_mass: np.ndarray
    uniform_entropy: np.ndarray
    modules: list[str]
    num_images: int

    def to_dataframe(self) -> pd.DataFrame:
        """One row a head: layer, module, head, entropy, std, confidence (nats), prefix_mass, self_mass, uniform_entropy (nats),
        num_images.

        Its `attrs["skipped"]` names the attention of the model that is no self-attention and so not in the table, with the
        reason.
        """
        values = ("entropy", "std", "confidence", "prefix_mass", "self_mass", "uniform_entropy", "num_images")
        return head_frame(self, self.modules, *values)

    def summary(self) -> pd.DataFrame:
        """One row a layer: mean and range of its heads' entropies (nats), mean prefix and self mass; `attrs` as there."""
        frame = self.to_dataframe()
        layers = frame.groupby("layer")
        columns = {
            "mean entropy (nats)": layers["entropy"].mean(),
            "sharpest head": layers["entropy"].min(),
            "broadest head": layers["entropy"].max(),
            "prefix mass": layers["prefix_mass"].mean(),
            "self mass": layers["self_mass"].mean(),
        }
        return layer_summary(frame, columns)

    def plot(self, *, ax: Axes | None = None, spread: bool = False) -> Axes:
        """Entropy against depth, a dot a head; `spread` adds the standard deviation over images."""
        from vit_probe.plots.attention_entropy import plot_attention_entropy

        return plot_attention_entropy(self.to_dataframe(), ax=ax, spread=spread)


def attention_entropy(
    model: nn.Module,
    images: Images,
    *,
    grid: TokenGrid | None = None,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> AttentionEntropyResult:
    """Shannon entropy of each query patch's attention to all tokens, in nats, for every layer and head.

    For layer l and head h: the mean over images and query patches i of - sum_j a_ij log a_ij, j over all tokens, prefix tokens
    included (in a layer that attends within windows, over those of the window of i). Beside it, the mean of what each query
    pays to prefix tokens, and to itself. Prefix tokens are no queries here.

    Args:
        model: Any Vision Transformer whose attention goes through `scaled_dot_product_attention`.
        images: Photographs, paths, a preprocessed tensor (batch, channel, height, width), or an iterable of such batches.
        grid: Where the patches lie; read from the model if None.
        preprocessing: How photographs are prepared; the model's own if None.
        batch_size: Images a forward pass.
        device: Where to run: `auto`, `cpu`, `cuda`, `mps`.

    Raises:
        InputError: If the images cannot be used, the grid does not fit the attention, or no attention is seen.

    References:
        Shannon 1948, A Mathematical Theory of Communication. As a measure of a head's attention: Clark et al. 2019,
        arXiv:1906.04341, section 3.3; of a Vision Transformer's training: Zhai et al. 2023, arXiv:2303.06296.
    """
    run = AttentionRun(model, images, grid=grid, preprocessing=preprocessing, batch_size=batch_size, device=device)
    measure = AttentionEntropy(run.grid, windows=run.windows)
    run.observe(measure)
    return measure.compute(run.provenance(measure.options))


class AttentionEntropy(PerHead):
    """The streaming measure behind `attention_entropy`; an observer for `attention_hooks`.

    Args:
        grid: Where the patches lie.
        windows: The layers whose attention is not over all the tokens of `grid`; see `vit_probe.tokens.locate.survey`.
    """

    display_name = "attention entropies"
    wants_scores = True

    def __init__(self, grid: TokenGrid, *, windows: Mapping[int, Windows] | None = None) -> None:
        super().__init__(grid, windows, _Entropy())

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def compute(self, provenance: dict[str, Any] | None = None) -> AttentionEntropyResult:
        """The result over all images so far.

        Raises:
            InputError: If there were none.
        """
        tables = self._tables()
        windows = self._windows_by_layer()
        tokens = [self.grid.num_tokens if window is None else window.patches.shape[1] for window in windows]
        return AttentionEntropyResult(
            entropy=tables.mean[0],
            std=tables.std[0],
            confidence=tables.confidence[0],
            prefix_mass=tables.mean[1],
            self_mass=tables.mean[2],
            uniform_entropy=np.log(tokens),
            modules=list(self._modules),
            num_images=tables.num_images,
            provenance=provenance or {},
        )


class _Entropy:
    """Entropy of each query's attention, without the logarithm of any but the largest weight.

    With scores s, 0 at the largest, and weights p = exp(s - z), - sum p log p = z - sum p s, and z = - log of the largest p.
    """

    def __init__(self) -> None:
        self._dots = RowDots()

    def per_query(self, queries: PatchQueries) -> tuple[Tensor, ...]:
        weights, scores = queries.probabilities, queries.scores
        if scores is None:
            raise InputError("entropy needs the scores of each tile, which observers with wants_scores = True are shown")
        largest = weights.amax(dim=-1)
        entropy = -self._dots(scores, weights, disposable=queries.disposable) - largest.log()
        others = weights.shape[-1] - queries.attention.shape[-1]
        on_prefix = weights[..., :others] if others else weights - queries.attention
        itself = weights.diagonal(offset=queries.query_index.start, dim1=-2, dim2=-1)
        return entropy.masked_fill(largest == 0, 0), on_prefix.sum(dim=-1), itself

    def values(self, sums: Float[Tensor, "3 image head query"]) -> Float[Tensor, "3 image head query"]:
        return sums
