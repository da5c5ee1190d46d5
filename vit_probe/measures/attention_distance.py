"""Mean attention distance: how far, in pixels, each head looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vit_probe.errors import InputError
from vit_probe.geometry import TokenGrid
from vit_probe.hooks import AttentionTile
from vit_probe.images import Preprocessing
from vit_probe.results import Result, check_finite
from vit_probe.run import AttentionRun
from vit_probe.stream import Images

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["AttentionDistance", "AttentionDistanceResult", "Prefix", "mean_attention_distance"]

Prefix = Literal["renormalize", "drop"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AttentionDistanceResult(Result):
    """Mean attention distance of every head.

    Args:
        distance: (layer, head), pixels of the model's input, mean over images and query patches.
        std: (layer, head), pixels, standard deviation over images of an image's mean (n - 1; NaN for one image).
        patch_mass: (layer, head), the part of patch queries' attention that falls on patches, mean over images and queries.
        uniform_distance: Pixels; the distance of a head that attends to all patches alike.
        num_images: Images averaged over.
        prefix: What became of attention paid to prefix tokens.
    """

    distance: np.ndarray
    std: np.ndarray
    patch_mass: np.ndarray
    uniform_distance: float
    num_images: int
    prefix: Prefix

    def to_dataframe(self) -> pd.DataFrame:
        """One row a head: layer, head, distance, std, patch_mass, uniform_distance (pixels), num_images."""
        layer, head = np.indices(self.distance.shape)
        return pd.DataFrame(
            {
                "layer": layer.ravel(),
                "head": head.ravel(),
                "distance": self.distance.ravel(),
                "std": self.std.ravel(),
                "patch_mass": self.patch_mass.ravel(),
                "uniform_distance": self.uniform_distance,
                "num_images": self.num_images,
            }
        )

    def summary(self) -> pd.DataFrame:
        """One row a layer: mean and range of its heads' distances (pixels), and mean patch mass."""
        return pd.DataFrame(
            {
                "layer": np.arange(len(self.distance)),
                "mean distance (px)": self.distance.mean(axis=1),
                "nearest head": self.distance.min(axis=1),
                "farthest head": self.distance.max(axis=1),
                "patch mass": self.patch_mass.mean(axis=1),
            }
        )

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
    patches no attention at all (a mass that rounds to 0) counts as distance 0 for that query.

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
    measure = AttentionDistance(run.grid, prefix=prefix)
    run.observe(measure)
    return measure.compute(run.provenance(measure.options))


class AttentionDistance:
    """The streaming measure behind `mean_attention_distance`; an observer for `attention_hooks`.

    Keeps sums over images in float64, so that splitting the images into batches or processes changes nothing but rounding.
    """

    def __init__(self, grid: TokenGrid, *, prefix: Prefix = "renormalize") -> None:
        if prefix not in get_args(Prefix):
            raise InputError(f"prefix must be one of {', '.join(get_args(Prefix))}; got {prefix!r}")
        self.grid = grid
        self.prefix = prefix
        self._sums: list[_Sums] = []
        self._pending: Tensor | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What distinguishes this measure from others of its kind, for provenance."""
        return {"prefix": self.prefix}

    def update(self, tile: AttentionTile) -> None:
        """Adds a tile. An image counts once its last query has come."""
        self.grid.check_tokens(tile.num_tokens)
        first = self.grid.num_prefix_tokens
        start, stop = max(tile.queries.start - first, 0), max(tile.queries.stop - first, 0)
        if tile.queries.start == 0:
            count, heads = tile.probabilities.shape[:2]
            device = tile.probabilities.device
            self._pending = torch.zeros(2, count, heads, dtype=_wide(device), device=device)
        assert self._pending is not None
        if stop > start:
            patches = tile.probabilities[:, :, start + first - tile.queries.start :, first:]
            distances = self.grid.distances(start, stop, device=patches.device)
            self._pending += _distance_and_mass(patches, distances, self.prefix)
        if tile.queries.stop == tile.num_tokens:
            while len(self._sums) <= tile.layer:
                self._sums.append(_Sums.zero(self._pending.shape[-1]))
            self._sums[tile.layer].add((self._pending / self.grid.num_patches).cpu().double().numpy())
            self._pending = None

    def merge(self, other: AttentionDistance) -> None:
        """Adds what `other` has seen. Either may have seen nothing.

        Raises:
            InputError: If `other` measures on another grid, with another `prefix`, or other layers and heads.
        """
        mine, theirs = ((m.grid, m.prefix, [len(layer.squares) for layer in m._sums]) for m in (self, other))
        if mine[:2] != theirs[:2] or (self._sums and other._sums and mine != theirs):
            raise InputError(f"cannot merge distances of (grid, prefix, heads of each layer) {theirs} into {mine}")
        if not self._sums:
            self._sums = [_Sums.zero(heads) for heads in theirs[2]]
        for layer, added in zip(self._sums, other._sums, strict=False):
            layer.merge(added)

    def compute(self, provenance: dict[str, Any] | None = None) -> AttentionDistanceResult:
        """The result over all images so far.

        Raises:
            InputError: If there were none.
        """
        if not self._sums:
            raise InputError("no attention has been measured yet")
        if len({(layer.count, layer.mean.shape) for layer in self._sums}) > 1:
            shapes = ", ".join(f"{layer.mean.shape[1]} heads on {layer.count} images" for layer in self._sums)
            raise InputError(f"the layers differ in heads or images ({shapes}); they do not make one table")
        mean = np.stack([layer.mean for layer in self._sums], axis=1)
        check_finite(mean, "attention distances")
        return AttentionDistanceResult(
            distance=mean[0],
            std=np.stack([layer.std() for layer in self._sums]),
            patch_mass=mean[1],
            uniform_distance=self.grid.uniform_distance(),
            num_images=self._sums[0].count,
            prefix=self.prefix,
            provenance=provenance or {},
        )


@dataclass
class _Sums:
    """Mean over images of (distance, mass) of each head, and the sum of squared deviations of the distance."""

    count: int
    mean: Float[np.ndarray, "2 head"]
    squares: Float[np.ndarray, "head"]

    @classmethod
    def zero(cls, heads: int) -> _Sums:
        return cls(0, np.zeros((2, heads)), np.zeros(heads))

    def add(self, values: Float[np.ndarray, "2 image head"]) -> None:
        mean = values.mean(axis=1)
        self.merge(_Sums(values.shape[1], mean, ((values[0] - mean[0]) ** 2).sum(axis=0)))

    def merge(self, other: _Sums) -> None:
        """Chan et al. 1983: exact for any split, and stable where a sum of squares would cancel."""
        total = self.count + other.count
        if total == 0:
            return
        step = other.mean - self.mean
        self.squares = self.squares + other.squares + step[0] ** 2 * (self.count * other.count / total)
        self.mean = self.mean + step * (other.count / total)
        self.count = total

    def std(self) -> Float[np.ndarray, "head"]:
        return np.sqrt(self.squares / (self.count - 1)) if self.count > 1 else np.full_like(self.squares, np.nan)


def _distance_and_mass(
    attention: Float[Tensor, "image head query patch"], distances: Float[Tensor, "query patch"], prefix: Prefix
) -> Float[Tensor, "2 image head"]:
    """Sums over the queries of the attention-weighted distance and of the attention that falls on patches."""
    sums = torch.stack([torch.linalg.vecdot(attention, distances.to(attention)), attention.sum(dim=-1)])
    distance, mass = sums.to(_wide(attention.device))
    if prefix == "renormalize":
        distance = distance / mass.clamp_min(torch.finfo(attention.dtype).tiny)
    return torch.stack([distance, mass]).sum(dim=-1)


def _wide(device: torch.device) -> torch.dtype:
    """The type for sums: float64, which MPS does not know."""
    return torch.float32 if device.type == "mps" else torch.float64
