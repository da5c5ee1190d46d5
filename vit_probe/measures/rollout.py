"""Attention rollout: how much of each patch reaches the class token through all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, UInt8

from vit_probe.attention.projections import UNSEEN
from vit_probe.attention.tiles import AttentionInputs, AttentionTile
from vit_probe.errors import InputError
from vit_probe.measures.base.per_image import PerImageMaps
from vit_probe.measures.base.registry import streaming_measure
from vit_probe.measures.map_statistics import map_correlation
from vit_probe.measures.rollout_algorithms import (
    Algorithm,
    FusedMaps,
    HeadFusion,
    Product,
    RightToLeft,
    RolloutAlgorithm,
    cheapest_algorithm,
)
from vit_probe.results import KeyNumber, Result
from vit_probe.runner.run import AttentionRun
from vit_probe.tokens.grid import TokenGrid, Windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["AttentionRollout", "AttentionRolloutResult", "HeadFusion", "attention_rollout"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AttentionRolloutResult(Result):
    """The rollout map of each image.

    Args:
        maps: (image, row, col), the rollout from the class token to the patches; in models without a class token, the mean of
            the rollouts from all patches. Not rescaled: the remainder to a sum of 1 went to prefix tokens.
        images: uint8 (image, height, width, channel), the first 64 images as the model saw them; None if their preprocessing
            is unknown.
        names: Name of each image.
        head_fusion: How the heads of each layer were combined.
        discard_ratio: Fraction of each layer's entries that were set to zero.
        algorithm: How the rollout was computed, see `attention_rollout`. It affects only rounding (and which of nearly equal
            entries are set to zero).
    """

    measure: str = "rollout"
    maps: Float[np.ndarray, "image row col"]
    images: UInt8[np.ndarray, "shown height width channel"] | None
    names: Annotated[list[str], "image"]
    head_fusion: HeadFusion
    discard_ratio: float
    algorithm: Algorithm

    def to_dataframe(self) -> pd.DataFrame:
        """One row per image and patch: image, name, row, col, rollout."""
        image, row, col = (index.ravel() for index in np.indices(self.maps.shape))
        name = np.asarray(self.names, dtype=object)[image]
        return pd.DataFrame({"image": image, "name": name, "row": row, "col": col, "rollout": self.maps.ravel()})

    def summary(self) -> pd.DataFrame:
        """One row for each of the first eight images: the sum over its patches, and the patch with the largest value."""
        rows, cols = np.unravel_index(self.maps.reshape(len(self.maps), -1).argmax(axis=1), self.maps.shape[1:])
        frame = pd.DataFrame(
            {"image": self.names, "on patches": self.maps.sum(axis=(1, 2)), "peak row": rows, "peak col": cols}
        )
        return frame.head(8)

    def key_numbers(self) -> list[KeyNumber]:
        """The ratio of a map's largest value to its mean (1 if all patches have the same value), median over images; and the
        correlation over patches between the maps of two images, median over pairs of images.
        """
        maps = self.maps.astype(np.float64)
        first, second = np.triu_indices(len(maps), 1)
        return [
            ("largest over mean", "", float(np.median(maps.max(axis=(1, 2)) / maps.mean(axis=(1, 2))))),
            ("correlation of images", "", float(pd.Series(map_correlation(maps[first], maps[second])).median())),
        ]

    @property
    def panel_title(self) -> str:
        """Title of the result's panel in the overview."""
        return "Rollout\n(input, attention)"

    def plot_panel(self, *, ax: Axes) -> Axes:
        """Draw the first two images."""
        return self.plot(ax=ax, count=2)

    def plot(self, *, ax: Axes | None = None, kind: Literal["pairs", "heatmap"] = "pairs", count: int = 8) -> Axes:
        """Draw each image beside its rollout.

        Args:
            ax: Where to draw; a new figure if None.
            kind: `pairs` darkens the image where there is little attention, as in the ViT paper; `heatmap` draws a heat map.
            count: How many images to draw, from the first.
        """
        from vit_probe.plots import plot_rollout

        return plot_rollout(self.maps[:count], None if self.images is None else self.images[:count], kind=kind, ax=ax)


@streaming_measure(result=AttentionRolloutResult, name="rollout", command="rollout", shows_images=True)
def attention_rollout(
    run: AttentionRun, *, head_fusion: Literal["mean", "max", "min"] = "mean", discard_ratio: float = 0.0
) -> AttentionRollout:
    """How attention carries information from each patch to the class token through all layers.

    For each layer, A = 0.5 F + 0.5 I, where F is the mean over heads, and each row of A is divided by its sum. The rollout is
    R = A_L ... A_1; the result is the class token's row of R, restricted to the patches. In models without a class token it is
    the mean of the patches' rows. Each image is computed separately, so the batches do not matter.

    The algorithm depends on the number of tokens; the result's `algorithm` names it. With few tokens, the product is formed
    while the model runs (`product`). If the number of tokens exceeds 3/4 of the model's width, A is kept for each layer, and
    the class token's row is multiplied by these matrices at the end, from the last layer to the first (`maps`). If it exceeds
    4 times the width, only queries and keys are kept, and A is recomputed tile by tile (`recomputed`; with `max`, `min` or
    discarding, one whole A at a time), except where attention has a bias. Memory grows with the number of images in a batch:
    a smaller `batch_size` needs less.

    Args:
        head_fusion: How the heads of a layer are combined. `mean` is the paper's choice; `max` and `min` come from the program
            vit-explain.
        discard_ratio: In [0, 1); 0 in the paper, and also from vit-explain. The fraction of the entries of F that are set to
            zero, smallest first, before I is added and rows are normalised; separately for each image and layer, and without
            the class token's column.

    Raises:
        InputError: If an option is invalid, the model attends within windows, the attention of some layers cannot be seen, the
            images cannot be used, or the grid does not fit the attention.

    References:
        Abnar & Zuidema 2020, arXiv:2005.00928, section 3; Dosovitskiy et al. 2021, arXiv:2010.11929, figure 6 and appendix D.8.

    Examples:
        >>> import torch
        >>> from vit_probe import attention_rollout, load_model
        >>> attention_rollout(load_model("demo"), torch.zeros(1, 3, 64, 64)).maps.shape
        (1, 8, 8)
    """
    unseen = [path for path, reason in run.skipped.items() if reason == UNSEEN]
    if unseen:
        raise InputError(
            f"rollout multiplies the attention of all layers, but that of {', '.join(unseen[:3])} cannot be measured: {UNSEEN}"
        )
    return AttentionRollout(run.grid, head_fusion=head_fusion, discard_ratio=discard_ratio, windows=run.windows)


class AttentionRollout(PerImageMaps):
    """The streaming measure behind `attention_rollout`; an observer for `attention_hooks`.

    Args:
        grid: Where the patches lie.
        head_fusion: See `attention_rollout`.
        discard_ratio: See `attention_rollout`.
        windows: The layers whose attention does not cover all tokens of `grid`; must be empty or None, since rollout is not
            defined for them.

    Raises:
        InputError: If an option is invalid, `windows` names any layer, or it is unknown which token is the class token.

    Examples:
        >>> import torch
        >>> from vit_probe import load_model
        >>> run = AttentionRun(load_model("demo"), torch.zeros(1, 3, 64, 64))
        >>> measure = AttentionRollout(run.grid, head_fusion="max")
        >>> run.observe(measure)
        >>> measure.compute().maps.shape
        (1, 8, 8)
    """

    name = "rollout"
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
                f"rollout needs attention over all tokens in every layer, but {len(windows)} layers of this model (the first "
                f"is layer {min(windows)}) attend within windows or over merged patches; use mean_attention_distance"
            )
        self.head_fusion = head_fusion
        self.discard_ratio = discard_ratio
        self._class_token = grid.find_class_token()
        self._depths: set[int] = set()  # how many layers images went through; `compute` requires a single number
        self._algorithm: Algorithm = "product"
        self._batch: RolloutAlgorithm = Product()  # of the current batch
        self._fused = self._fuse()

    @property
    def options(self) -> dict[str, Any]:
        return {"head_fusion": self.head_fusion, "discard_ratio": self.discard_ratio}

    def begin_layer(self, inputs: AttentionInputs) -> bool:
        """Take a layer's queries and keys, and return whether its tiles are needed."""
        self.grid.check_tokens(inputs.key.shape[-2])
        if inputs.layer == 0:
            self._finish_batch()
            self._algorithm = cheapest_algorithm(inputs)
            self._batch = Product() if self._algorithm == "product" else RightToLeft(self._algorithm, self._fuse)
        return self._batch.begin_layer(inputs)

    def update(self, tile: AttentionTile) -> None:
        """Add a tile. Once all queries of its images have come, their rollout advances by one layer."""
        self.grid.check_tokens(tile.num_tokens)
        if tile.layer == tile.images.start == tile.queries.start == tile.heads.start == 0:
            self._finish_batch()
        fused = self._fused.add(tile)
        if fused is not None:
            self._batch.add(tile.images, fused)

    def roll_back(self) -> None:
        """Forget everything since `begin_batch`, even if the batch has ended."""
        super().roll_back()
        self._batch, self._fused = Product(), self._fuse()

    def state(self) -> dict[str, Any]:
        """What `restore` needs to continue from here: arrays and JSON-serialisable values."""
        return super().state() | {"depths": sorted(self._depths), "algorithm": self._algorithm}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to a `state` of a measure with the same grid and options."""
        super().restore(state)
        self._depths = set(state["depths"])
        self._algorithm = state["algorithm"]

    def merge(self, other: Self) -> None:
        """Append the maps of `other`.

        Raises:
            InputError: If `other` has a different grid or different options.
        """
        super().merge(other)
        self._depths |= other._depths
        if len(self._maps) == len(other._maps):  # this measure was empty, so its algorithm is only the default
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
        return FusedMaps(self.head_fusion, self.discard_ratio, self._class_token)

    def _finish_batch(self) -> None:
        batch = self._batch
        if not batch.reached:
            return
        weights = torch.zeros(self.grid.num_tokens)
        if self._class_token is None:
            weights[self.grid.patch_tokens] = 1 / self.grid.num_patches
        else:
            weights[self._class_token] = 1
        with torch.no_grad():
            rows = [row[self.grid.patch_tokens].float().cpu() for row in batch.rows(weights)]
        self._maps.append(torch.stack(rows).view(-1, self.grid.rows, self.grid.cols).numpy())
        self._depths |= set(batch.reached)
        self._batch = Product()  # only now, so that a failure for lack of memory above can be retried
