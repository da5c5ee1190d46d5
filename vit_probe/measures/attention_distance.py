"""Mean attention distance: how far, in pixels, each head looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
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

__all__ = ["AttentionDistance", "AttentionDistanceResult", "Prefix", "mean_attention_distance"]

Prefix = Literal["renormalize", "drop"]
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AttentionDistanceResult(Result):
    """Mean attention distance of every head.

    Args:
        distance: (layer, head), pixels of the model's input, mean over images and query patches; NaN where a layer has fewer
            heads than others.
        std: (layer, head), pixels, standard deviation over images of an image's mean (n - 1; NaN for one image).
        confidence: (layer, head), pixels, half the width of the 95 % confidence interval of the mean over all images that these
            are drawn from (Student's t; NaN for one image).
        patch_mass: (layer, head), the part of patch queries' attention that falls on patches, mean over images and queries.
        uniform_distance: (layer), pixels; the distance of a head that attends alike to all patches that it may see.
        num_windows: (layer), windows that attention is kept within; 1 where it is over the whole image.
        modules: Path of each layer's module.
        num_images: Images averaged over.
        prefix: What became of attention paid to prefix tokens.
    """

    distance: np.ndarray
    std: np.ndarray
    confidence: np.ndarray
    patch_mass: np.ndarray
    uniform_distance: np.ndarray
    num_windows: np.ndarray
    modules: list[str]
    num_images: int
    prefix: Prefix

    def to_dataframe(self) -> pd.DataFrame:
        """One row a head: layer, module, head, distance, std, confidence, patch_mass, uniform_distance (pixels), num_windows,
        num_images.

        Its `attrs["skipped"]` names the attention of the model that is no self-attention and so not in the table, with the
        reason.
        """
        values = ("distance", "std", "confidence", "patch_mass", "uniform_distance", "num_windows", "num_images")
        return head_frame(self, self.modules, *values)

    def summary(self) -> pd.DataFrame:
        """One row a layer: mean and range of its heads' distances (pixels), and mean patch mass; `attrs` as in the table."""
        frame = self.to_dataframe()
        layers = frame.groupby("layer")
        distance = layers["distance"]
        columns = {
            "mean distance (px)": distance.mean(),
            "nearest head": distance.min(),
            "farthest head": distance.max(),
            "patch mass": layers["patch_mass"].mean(),
        }
        if (self.num_windows > 1).any():
            columns["windows"] = layers["num_windows"].first()
        return layer_summary(frame, columns)

    def plot(self, *, ax: Axes | None = None, spread: bool = False) -> Axes:
        """Distance against depth, a dot a head; `spread` adds the standard deviation over images."""
        from vit_probe.plots import plot_attention_distance

        return plot_attention_distance(self.to_dataframe(), ax=ax, spread=spread)


def mean_attention_distance(
    model: nn.Module,
    images: Images,
    *,
    prefix: Prefix = "renormalize",
    grid: TokenGrid | None = None,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> AttentionDistanceResult:
    """Attention-weighted distance from each query patch to all patches, in pixels, for every layer and head.

    For layer l and head h: the mean over images and query patches i of sum_j a_ij ||x_i - x_j||, x the patch centres in pixels
    of the model's input. The distance of a patch to itself is 0 and counts. Prefix tokens are no queries here. A head that pays
    patches no attention at all (a mass that rounds to 0) counts as distance 0 for that query. In a layer that attends within
    windows (SAM, Swin) j runs over the window of i; tokens that pad a window are treated like prefix tokens.

    Args:
        model: Any Vision Transformer whose attention goes through `scaled_dot_product_attention`.
        images: Photographs, paths, a preprocessed tensor (batch, channel, height, width), or an iterable of such batches.
        prefix: What becomes of attention paid to prefix tokens, which the paper leaves open: `renormalize` rescales the patch
            keys' weights to sum to 1, so that a head that parks mass on the class token is not mistaken for a local one; `drop`
            leaves them as they are.
        grid: Where the patches lie; read from the model if None.
        preprocessing: How photographs are prepared; the model's own if None.
        batch_size: Images a forward pass.
        device: Where to run: `auto`, `cpu`, `cuda`, `mps`.

    Raises:
        InputError: If an option is unknown, the images cannot be used, the grid does not fit the attention, or no attention
        is seen.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figures 7 (right) and 11, section 4.5, appendix D.7;
        Raghu et al. 2021, arXiv:2108.08810, figure 3.
    """
    run = AttentionRun(model, images, grid=grid, preprocessing=preprocessing, batch_size=batch_size, device=device)
    measure = AttentionDistance(run.grid, prefix=prefix, windows=run.windows)
    run.observe(measure)
    return measure.compute(run.provenance(measure.options))


class AttentionDistance(PerHead):
    """The streaming measure behind `mean_attention_distance`; an observer for `attention_hooks`.

    Args:
        grid: Where the patches lie.
        prefix: See `mean_attention_distance`.
        windows: The layers whose attention is not over all the tokens of `grid`; see `vit_probe.tokens.locate.survey`.
    """

    display_name = "attention distances"

    def __init__(
        self, grid: TokenGrid, *, prefix: Prefix = "renormalize", windows: Mapping[int, Windows] | None = None
    ) -> None:
        if prefix not in get_args(Prefix):
            raise InputError(f"prefix must be one of {', '.join(get_args(Prefix))}; got {prefix!r}")
        self.prefix: Prefix = prefix
        super().__init__(grid, windows, _DistanceAndMass(prefix))

    @property
    def options(self) -> dict[str, Any]:
        return {"prefix": self.prefix}

    def compute(self, provenance: dict[str, Any] | None = None) -> AttentionDistanceResult:
        """The result over all images so far.

        Raises:
            InputError: If there were none.
        """
        tables = self._tables()
        windows = self._windows_by_layer()
        return AttentionDistanceResult(
            distance=tables.mean[0],
            std=tables.std[0],
            confidence=tables.confidence[0],
            patch_mass=tables.mean[1],
            uniform_distance=np.array([(window or self.grid).uniform_distance() for window in windows]),
            num_windows=np.array([1 if window is None else len(window.patches) for window in windows]),
            modules=list(self._modules),
            num_images=tables.num_images,
            prefix=self.prefix,
            provenance=provenance or {},
        )


class _DistanceAndMass:
    """The attention-weighted distance of each query, and the attention that falls on patches."""

    def __init__(self, prefix: Prefix) -> None:
        self._prefix = prefix
        self._dots = RowDots()

    def per_query(self, queries: PatchQueries) -> tuple[Tensor, Tensor]:
        mass = queries.attention.sum(dim=-1)
        return self._dots(queries.attention, queries.distances(), disposable=queries.disposable), mass

    def values(self, sums: Float[Tensor, "2 image head query"]) -> Float[Tensor, "2 image head query"]:
        distance, mass = sums
        if self._prefix == "renormalize":
            distance = distance / mass.clamp_min(_TINY)
        return torch.stack([distance, mass])
