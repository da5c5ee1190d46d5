"""Attention rollout: how much of each patch reaches the class token, through all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
import pandas as pd
import torch
from torch import nn

from vit_probe.attention.tiles import AttentionInputs, AttentionTile
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.data.stream import Images
from vit_probe.errors import InputError
from vit_probe.measures.base.per_image import SHOWN_IMAGES, PerImageMaps
from vit_probe.measures.rollout_algorithms import (
    Algorithm,
    FusedMaps,
    HeadFusion,
    Product,
    RightToLeft,
    RolloutAlgorithm,
    cheapest_algorithm,
)
from vit_probe.results import Result
from vit_probe.runner.run import AttentionRun
from vit_probe.tokens.grid import TokenGrid, Windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["AttentionRollout", "AttentionRolloutResult", "HeadFusion", "attention_rollout"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AttentionRolloutResult(Result):
    """A rollout map of every image.

    Args:
        maps: (image, row, col), the rollout of the class token (or the mean over patches where there is none) onto the
            patches; not rescaled: what is missing to a sum of 1 went to prefix tokens.
        images: uint8 (image, height, width, channel), the first 64 images as the model saw them; None if their preprocessing
            is unknown.
        names: Name of each image.
        head_fusion: How the heads of a layer became one.
        discard_ratio: Part of each layer's entries set to zero.
        algorithm: How it was computed, which changes nothing but rounding (and which of nearly equal entries are set to zero); see
            `attention_rollout`.
    """

    maps: np.ndarray
    images: np.ndarray | None
    names: list[str]
    head_fusion: HeadFusion
    discard_ratio: float
    algorithm: Algorithm

    def to_dataframe(self) -> pd.DataFrame:
        """One row a patch of an image: image, name, row, col, rollout."""
        image, row, col = (index.ravel() for index in np.indices(self.maps.shape))
        name = np.asarray(self.names, dtype=object)[image]
        return pd.DataFrame({"image": image, "name": name, "row": row, "col": col, "rollout": self.maps.ravel()})

    def summary(self) -> pd.DataFrame:
        """One row for each of the first eight images: how much reached its patches in all, and the patch with most."""
        rows, cols = np.unravel_index(self.maps.reshape(len(self.maps), -1).argmax(axis=1), self.maps.shape[1:])
        frame = pd.DataFrame(
            {"image": self.names, "on patches": self.maps.sum(axis=(1, 2)), "peak row": rows, "peak col": cols}
        )
        return frame.head(8)

    def plot(self, *, ax: Axes | None = None, kind: Literal["pairs", "heatmap"] = "pairs", count: int = 8) -> Axes:
        """The first `count` images beside their attention: over black as in the ViT paper, or as a heat map."""
        from vit_probe.plots import plot_rollout

        return plot_rollout(self.maps[:count], None if self.images is None else self.images[:count], kind=kind, ax=ax)


def attention_rollout(
    model: nn.Module,
    images: Images,
    *,
    head_fusion: HeadFusion = "mean",
    discard_ratio: float = 0.0,
    grid: TokenGrid | None = None,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> AttentionRolloutResult:
    """How attention carries each patch to the class token through all layers.

    Per layer A = 0.5 F + 0.5 I, F the mean over heads, each row divided by its sum; R = A_L ... A_1; the class token's row of
    R over the patches. Where there is no class token, the mean of the patches' rows. Every image is computed by itself,
    whatever its batch.

    With few tokens the product is formed while the model runs (the result's `algorithm` is `product`). Where there are more than 3/4
    as many tokens as the model is wide, each layer's A is kept, and the class token's row goes back through them at the end
    (`maps`). Where there are more than 4 times as many, only queries and keys are kept, and A is made again tile by tile
    (`recomputed`; for `max`, `min` and discarding one whole A at a time); not where attention has a bias. What is
    kept is kept for each image of a batch: a smaller `batch_size` takes less memory.

    Args:
        model: Any Vision Transformer whose attention goes through `scaled_dot_product_attention`.
        images: Photographs, paths, a preprocessed tensor (batch, channel, height, width), or an iterable of such batches.
        head_fusion: `mean` is the paper's; `max` and `min` are the additions of the program vit-explain.
        discard_ratio: In [0, 1), also vit-explain's addition, 0 in the paper: of the entries of F, per image and layer, those
            outside the class token's column, this part is set to zero, the smallest first, before I is added and rows are
            normalised.
        grid: Where the patches lie; read from the model if None.
        preprocessing: How photographs are prepared; the model's own if None.
        batch_size: Images a forward pass.
        device: Where to run: `auto`, `cpu`, `cuda`, `mps`.

    Raises:
        InputError: If an option is unknown, the images cannot be used, the grid does not fit the attention, or no attention
        is seen.

    References:
        Abnar & Zuidema 2020, arXiv:2005.00928, section 3; Dosovitskiy et al. 2021, arXiv:2010.11929, figure 6 and appendix D.8.
    """
    run = AttentionRun(
        model, images, grid=grid, preprocessing=preprocessing, batch_size=batch_size, device=device, keep_images=SHOWN_IMAGES
    )
    measure = AttentionRollout(run.grid, head_fusion=head_fusion, discard_ratio=discard_ratio, windows=run.windows)
    run.observe(measure)
    provenance = run.provenance(measure.options)
    return measure.compute(provenance, names=run.images.names, images=run.images.kept())


class AttentionRollout(PerImageMaps):
    """The streaming measure behind `attention_rollout`; an observer for `attention_hooks`.

    Args:
        grid: Where the patches lie.
        head_fusion: See `attention_rollout`.
        discard_ratio: See `attention_rollout`.
        windows: The layers whose attention is not over all the tokens of `grid`, for which there is no rollout.

    Raises:
        InputError: If an option is unknown, or there are such layers.
    """

    display_name = "rollouts"

    def __init__(
        self,
        grid: TokenGrid,
        *,
        head_fusion: HeadFusion = "mean",
        discard_ratio: float = 0.0,
        windows: Mapping[int, Windows] | None = None,
    ) -> None:
        super().__init__(grid)
        if head_fusion not in get_args(HeadFusion):
            raise InputError(f"head_fusion must be one of {', '.join(get_args(HeadFusion))}; got {head_fusion!r}")
        if not 0 <= discard_ratio < 1:
            raise InputError(f"discard_ratio must lie in [0, 1), got {discard_ratio}")
        if windows:
            raise InputError(
                f"rollout follows attention over all tokens from layer to layer, but {len(windows)} layers of this model (the "
                f"first is layer {min(windows)}) attend within windows or over merged patches; use mean_attention_distance"
            )
        self.head_fusion = head_fusion
        self.discard_ratio = discard_ratio
        self._depths: set[int] = set()  # layers of the batches so far; there must be but one number
        self._algorithm: Algorithm = "product"
        self._batch: RolloutAlgorithm = Product()  # the current one
        self._fused = self._fuse()

    @property
    def options(self) -> dict[str, Any]:
        return {"head_fusion": self.head_fusion, "discard_ratio": self.discard_ratio}

    def begin_layer(self, inputs: AttentionInputs) -> bool:
        """Told of a layer before its tiles; whether they are needed."""
        self.grid.check_tokens(inputs.key.shape[-2])
        if inputs.layer == 0:
            self._finish_batch()
            self._algorithm = cheapest_algorithm(inputs)
            self._batch = Product() if self._algorithm == "product" else RightToLeft(self._algorithm, self._fuse)
        return self._batch.begin_layer(inputs)

    def update(self, tile: AttentionTile) -> None:
        """Adds a tile. Once its images have all their queries, their rollout moves on by a layer."""
        self.grid.check_tokens(tile.num_tokens)
        if tile.layer == tile.images.start == tile.queries.start == tile.heads.start == 0:
            self._finish_batch()
        fused = self._fused.add(tile)
        if fused is not None:
            self._batch.add(tile.images, fused)

    def roll_back(self) -> None:
        """Forgets what came since `begin_batch`, also where the batch had ended."""
        super().roll_back()
        self._batch, self._fused = Product(), self._fuse()

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here: arrays, and what JSON can hold."""
        return super().state() | {"depths": sorted(self._depths), "algorithm": self._algorithm}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to where `state` was taken, of a measure with the same grid and options."""
        super().restore(state)
        self._depths = set(state["depths"])
        self._algorithm = state["algorithm"]

    def merge(self, other: Self) -> None:
        """Appends the maps of `other`.

        Raises:
            InputError: If `other` has another grid or other options.
        """
        super().merge(other)
        self._depths |= other._depths
        if len(self._maps) == len(other._maps):  # it had none of its own
            self._algorithm = other._algorithm

    def compute(
        self, provenance: dict[str, Any] | None = None, *, names: list[str] | None = None, images: np.ndarray | None = None
    ) -> AttentionRolloutResult:
        """The result over all images so far.

        Raises:
            InputError: If there were none, or some went through fewer layers than others.
        """
        self._finish_batch()
        if len(self._depths) > 1:
            raise InputError(f"images went through different numbers of layers: {', '.join(map(str, sorted(self._depths)))}")
        return AttentionRolloutResult(
            **self._result(provenance, names, images),
            head_fusion=self.head_fusion,
            discard_ratio=self.discard_ratio,
            algorithm=self._algorithm,
        )

    def _fuse(self) -> FusedMaps:
        return FusedMaps(self.head_fusion, self.discard_ratio, int(self.grid.has_cls_token))

    def _finish_batch(self) -> None:
        batch = self._batch
        if not batch.reached:
            return
        first = self.grid.num_prefix_tokens
        asks = slice(0, 1) if self.grid.has_cls_token else slice(first, None)
        weights = torch.zeros(self.grid.num_tokens)
        weights[asks] = 1 / len(weights[asks])
        with torch.no_grad():
            rows = [row[first:].float().cpu() for row in batch.rows(weights)]
        self._maps.append(torch.stack(rows).view(-1, self.grid.rows, self.grid.cols).numpy())
        self._depths |= set(batch.reached)
        self._batch = Product()  # not before: what failed for lack of memory can be tried again
