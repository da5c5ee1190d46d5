"""From tiles to whole images: means over the patches that ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vit_probe.attention.tiles import AttentionTile, Workspace
from vit_probe.errors import InputError
from vit_probe.tokens.grid import TokenGrid, Windows

__all__ = ["ImageMeans", "PatchQueries", "PerQuery", "RowDots", "wide"]

_KEPT_DISTANCES = 1 << 20  # pairs of patches whose distances are kept, 4 MB; of larger grids only those of a tile


@dataclass(frozen=True, slots=True)
class PatchQueries:
    """The attention of those queries of a tile that are patches.

    Args:
        probabilities: To all tokens.
        scores: What the softmax was taken of; None unless they were asked for.
        attention: To the patches, or to all tokens of a window, 0 to what is no patch.
        distances: Gives those to what `attention` is to, in pixels.
        query_index: Where `probabilities` are of a query to query_index.
        disposable: Whether `probabilities`, `scores` and `attention` may be written to.
    """

    probabilities: Float[Tensor, "image head query token"]
    scores: Float[Tensor, "image head query token"] | None
    attention: Float[Tensor, "image head query patch"]
    distances: Callable[[], Float[Tensor, "*#window query patch"]]
    query_index: slice
    disposable: bool


class RowDots:
    """Sums of products of rows; the products take the place of the left ones where these may be written to."""

    def __init__(self) -> None:
        self._products = Workspace()

    def __call__(
        self, left: Float[Tensor, "image head query key"], right: Float[Tensor, "*#query key"], *, disposable: bool
    ) -> Float[Tensor, "image head query"]:
        products = left if disposable else self._products.take(left.shape, left.dtype, left.device)
        return torch.mul(left, right, out=products).sum(dim=-1)


class PerQuery(Protocol):
    """What is averaged."""

    def per_query(self, queries: PatchQueries) -> Sequence[Float[Tensor, "image head query"]]:
        """Sums over the attention of each query, tile by tile."""
        ...

    def values(self, sums: Float[Tensor, "sum image head query"]) -> Float[Tensor, "value image head query"]:
        """The values of each query, from its sums in double precision."""
        ...


class ImageMeans:
    """Means of some values over the patch queries of each image, gathered tile by tile.

    Args:
        grid: Where the patches lie.
        windows: The layers whose attention is not over all the tokens of `grid`.
        values: What is averaged.
    """

    def __init__(self, grid: TokenGrid, windows: Mapping[int, Windows], values: PerQuery) -> None:
        self._grid = grid
        self._windows = windows
        self._values = values
        self._distances = _Distances(grid)
        self._sums: list[Tensor] = []  # of the images or windows whose queries are not complete
        self._waiting: list[Float[np.ndarray, "value window head"]] = []  # windows of an image that is not complete

    def add(self, tile: AttentionTile) -> Float[np.ndarray, "image value head"] | None:
        """The means of the images that the tile completes, in float64; None if it completes none.

        Raises:
            InputError: If the tile is of other tokens than the grid or the windows.
        """
        windows = self._windows.get(tile.layer)
        if tile.queries.start == tile.heads.start == 0:
            self._sums = []
            if tile.images.start == 0:
                self._waiting = []  # of a pass that broke off
        queries = self._of_whole(tile) if windows is None else self._of_windows(tile, windows)
        if queries is not None:
            sums = self._values.per_query(queries)
            if not self._sums:
                self._sums = [one.new_zeros(len(one), tile.num_heads, tile.num_tokens) for one in sums]
            for whole, part in zip(self._sums, sums, strict=True):
                whole[:, tile.heads, queries.query_index] = part
        if tile.queries.stop < tile.num_tokens or tile.heads.stop < tile.num_heads or not self._sums:
            return None
        gathered, self._sums = torch.stack(self._sums), []
        values = self._values.values(gathered.to(wide(gathered.device)))
        if windows is None:
            patches = self._grid.num_patches
            means = _in_float64(values[..., self._grid.num_prefix_tokens :].sum(dim=-1))
        else:
            patches = windows.grid.num_patches
            is_patch = windows.is_patch[_numbers(tile, windows)].to(values.device)
            means = self._whole_images(_in_float64((values * is_patch[:, None]).sum(dim=-1)), len(windows.patches))
        return np.moveaxis(means / patches, 0, 1) if means.shape[1] else None

    def _of_whole(self, tile: AttentionTile) -> PatchQueries | None:
        self._grid.check_tokens(tile.num_tokens)
        first = self._grid.num_prefix_tokens
        start, stop = max(tile.queries.start, first), tile.queries.stop
        if stop <= start:
            return None
        asking = slice(start - tile.queries.start, None)
        probabilities = tile.probabilities[:, :, asking]
        return PatchQueries(
            probabilities=probabilities,
            scores=None if tile.scores is None else tile.scores[:, :, asking],
            attention=probabilities[..., first:],
            distances=partial(self._distances.of, start - first, stop - first, probabilities),
            query_index=slice(start, stop),
            disposable=tile.disposable,
        )

    def _of_windows(self, tile: AttentionTile, windows: Windows) -> PatchQueries:
        if tile.num_tokens != windows.patches.shape[1]:
            raise InputError(
                f"attention of layer {tile.layer} ({tile.name}) is over {tile.num_tokens} tokens, but its windows have "
                f"{windows.patches.shape[1]}; pass the windows of the images that the model saw"
            )
        which = _numbers(tile, windows)
        is_patch = windows.is_patch[which].to(tile.probabilities.device)
        return PatchQueries(
            probabilities=tile.probabilities,
            scores=tile.scores,
            attention=tile.probabilities * is_patch[:, None, None, :],
            distances=lambda: windows.distances(which, tile.queries)[:, None].to(tile.probabilities),
            query_index=tile.queries,
            disposable=tile.disposable,
        )

    def _whole_images(
        self, sums: Float[np.ndarray, "value window head"], windows: int
    ) -> Float[np.ndarray, "value image head"]:
        """The sums of whole images; the windows of one that is not complete wait for the rest of it."""
        waiting = np.concatenate([*self._waiting, sums], axis=1)
        images = waiting.shape[1] // windows
        self._waiting = [waiting[:, images * windows :]]
        whole = waiting[:, : images * windows]
        return whole.reshape(len(whole), images, windows, whole.shape[2]).sum(axis=2)


def _numbers(tile: AttentionTile, windows: Windows) -> Int[Tensor, "window"]:
    """Which windows of their images a tile is of."""
    return torch.arange(tile.images.start, tile.images.stop) % len(windows.patches)


def _in_float64(values: Tensor) -> np.ndarray:
    return values.cpu().double().numpy()


class _Distances:
    """Distances from some patches to all."""

    def __init__(self, grid: TokenGrid) -> None:
        self._grid = grid
        self._all = grid.num_patches**2 <= _KEPT_DISTANCES
        self._memory = Workspace()
        self._held: tuple[Any, ...] = ()  # what the memory holds

    def of(self, start: int, stop: int, like: Tensor) -> Float[Tensor, "query patch"]:
        """Those of the patches `start` to `stop`, of the type and on the device of `like`."""
        first, last = (0, self._grid.num_patches) if self._all else (start, stop)
        distances = self._memory.take((last - first, self._grid.num_patches), like.dtype, like.device)
        if self._held != (first, last, like.dtype, like.device):
            self._grid.distances(first, last, device=like.device, out=distances)
            self._held = (first, last, like.dtype, like.device)
        return distances[start - first : stop - first]


def wide(device: torch.device) -> torch.dtype:
    """The type for sums: float64, which MPS does not know."""
    return torch.float32 if device.type == "mps" else torch.float64
