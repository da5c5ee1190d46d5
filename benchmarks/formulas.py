"""The measures as users of other libraries write them, from the whole attention map of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vit_probe import TokenGrid

__all__ = ["keras_distance", "patch_distances", "rollout_maps", "torch_distance"]


def patch_distances(grid: TokenGrid) -> Float[np.ndarray, "query key"]:
    """Euclidean distance in pixels between the centres of every two patches."""
    row, col = np.divmod(np.arange(grid.num_patches, dtype=np.float32), np.float32(grid.cols))
    height, width = grid.patch_size
    return np.hypot((row[:, None] - row[None, :]) * height, (col[:, None] - col[None, :]) * width)


def torch_distance(
    attention: Float[Tensor, "batch head query key"], distances: Float[Tensor, "patch patch"]
) -> Float[Tensor, " head"]:
    """Mean attention distance over queries, with the weights on patches rescaled to sum to 1; summed over images.

    The einsum is faster than a product followed by a sum.
    """
    patches = attention[:, :, 1:, 1:].float()
    weighted = torch.einsum("bhqk,qk->bhq", patches, distances)
    return (weighted / patches.sum(dim=-1)).mean(dim=-1).sum(dim=0)


def keras_distance(
    attention: Float[np.ndarray, "batch head query key"], distances: Float[np.ndarray, "patch patch"]
) -> Float[np.ndarray, " head"]:
    """Mean attention distance over queries as "probing ViTs" defines it; summed over images.

    The class token is left out as query and as key, the weights on patches are not rescaled, and the weighted distances are
    summed over keys.

    References:
        Gosthipaty & Paul 2022, "Investigating Vision Transformer representations", keras.io/examples/vision/probing_vits.
    """
    weighted = attention[:, :, 1:, 1:] * distances
    summed: np.ndarray = weighted.sum(axis=-1).mean(axis=-1).sum(axis=0)
    return summed


def rollout_maps(fused: Sequence[Float[Tensor, "batch query key"]], grid: TokenGrid) -> Float[Tensor, "batch row col"]:
    """The class token's rollout over the patches, from each layer's mean over heads.

    As all layers are available, only the class token's row is computed, from the last layer to the first, by one product of a
    vector and a matrix per layer; common implementations multiply whole matrices.

    References:
        Abnar & Zuidema 2020, arXiv:2005.00928, section 3.
    """
    row = torch.zeros_like(fused[-1][:, :1])
    row[:, :, 0] = 1
    for layer in reversed(fused):
        row = (row + row @ layer) / 2
    return row[:, 0, 1:].unflatten(-1, (grid.rows, grid.cols))
