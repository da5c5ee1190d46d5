"""From tiles to whole images: means over the patches that ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vit_probe.errors import InputError
from vit_probe.geometry import TokenGrid, Windows
from vit_probe.tiles import AttentionTile

__all__ = ["ImageMeans", "QueryValues", "wide"]

QueryValues = Callable[
    [Float[Tensor, "image head query patch"], Float[Tensor, "*image query patch"]], Float[Tensor, "value image head query"]
]
"""Values of each query, from its attention to the patches and its distance to them in pixels."""


class ImageMeans:
    """Means of some values over the patch queries of each image, gathered tile by tile.

    Args:
        grid: Where the patches lie.
        windows: The layers whose attention is not over all the tokens of `grid`.
        values: What is averaged.
    """

    def __init__(self, grid: TokenGrid, windows: Mapping[int, Windows], values: QueryValues) -> None:
        self._grid = grid
        self._windows = windows
        self._values = values
        self._sums: Tensor | None = None  # of the images or windows whose queries are not complete
        self._waiting: list[Float[np.ndarray, "value window head"]] = []  # windows of an image that is not complete

    def add(self, tile: AttentionTile) -> Float[np.ndarray, "image value head"] | None:
        """The means of the images that the tile completes, in float64; None if it completes none.

        Raises:
            InputError: If the tile is of other tokens than the grid or the windows.
        """
        windows = self._windows.get(tile.layer)
        if tile.images.start == tile.queries.start == 0:
            self._waiting = []  # of a pass that broke off
        if tile.queries.start == 0:
            self._sums = None
        values = self._of_whole(tile) if windows is None else self._of_windows(tile, windows)
        if values is not None:
            added = values.sum(dim=-1)
            self._sums = added if self._sums is None else self._sums + added
        if tile.queries.stop < tile.num_tokens or self._sums is None:
            return None
        sums = self._sums.cpu().double().numpy()
        self._sums = None
        patches = self._grid.num_patches
        if windows is not None:
            sums, patches = self._whole_images(sums, len(windows.patches)), windows.grid.num_patches
        return np.moveaxis(sums / patches, 0, 1) if sums.shape[1] else None

    def _of_whole(self, tile: AttentionTile) -> Float[Tensor, "value image head query"] | None:
        self._grid.check_tokens(tile.num_tokens)
        first = self._grid.num_prefix_tokens
        start, stop = max(tile.queries.start - first, 0), max(tile.queries.stop - first, 0)
        if stop == start:
            return None
        patches = tile.probabilities[:, :, start + first - tile.queries.start :, first:]
        return self._values(patches, self._grid.distances(start, stop, device=patches.device))

    def _of_windows(self, tile: AttentionTile, windows: Windows) -> Float[Tensor, "value window head query"]:
        if tile.num_tokens != windows.patches.shape[1]:
            raise InputError(
                f"attention of layer {tile.layer} ({tile.name}) is over {tile.num_tokens} tokens, but its windows have "
                f"{windows.patches.shape[1]}; pass the windows of the images that the model saw"
            )
        device = tile.probabilities.device
        which = torch.arange(tile.images.start, tile.images.stop) % len(windows.patches)
        is_patch = windows.is_patch[which].to(device)
        distances = windows.distances(which, tile.queries).to(device)
        values = self._values(tile.probabilities * is_patch[:, None, None, :], distances[:, None])
        return values * is_patch[:, None, tile.queries]

    def _whole_images(
        self, sums: Float[np.ndarray, "value window head"], windows: int
    ) -> Float[np.ndarray, "value image head"]:
        """The sums of whole images; the windows of one that is not complete wait for the rest of it."""
        waiting = np.concatenate([*self._waiting, sums], axis=1)
        images = waiting.shape[1] // windows
        self._waiting = [waiting[:, images * windows :]]
        whole = waiting[:, : images * windows]
        return whole.reshape(len(whole), images, windows, whole.shape[2]).sum(axis=2)


def wide(device: torch.device) -> torch.dtype:
    """The type for sums: float64, which MPS does not know."""
    return torch.float32 if device.type == "mps" else torch.float64
