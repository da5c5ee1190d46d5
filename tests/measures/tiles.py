"""Random attention, fed to a measure as `attention_hooks` would."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from vit_probe import AttentionTile, TokenGrid

grids = st.builds(
    TokenGrid,
    rows=st.integers(1, 4),
    cols=st.integers(1, 4),
    patch_size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    num_prefix_tokens=st.integers(1, 3),
    has_cls_token=st.booleans(),
) | st.builds(TokenGrid, st.integers(1, 4), st.integers(1, 4), st.just((8, 6)), st.just(0), st.just(False))


def random_attention(
    grid: TokenGrid, *, layers: int = 2, batch: int = 3, heads: int = 2, sharpness: float = 2.0, seed: int = 0
) -> np.ndarray:
    """(layer, batch, head, query, key), rows summing to 1; what float32 holds, in float64."""
    scores = np.random.default_rng(seed).normal(scale=sharpness, size=(layers, batch, heads, grid.num_tokens, grid.num_tokens))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32).astype(np.float64)


def uniform_attention(grid: TokenGrid) -> np.ndarray:
    return np.full((2, 3, 2, grid.num_tokens, grid.num_tokens), 1 / grid.num_tokens)


def identity_attention(grid: TokenGrid) -> np.ndarray:
    return np.broadcast_to(np.eye(grid.num_tokens), (2, 3, 2, grid.num_tokens, grid.num_tokens))


def feed(
    measure: Any,
    attention: np.ndarray,
    *,
    batch_size: int = 100,
    images: int = 100,
    rows: int = 1000,
    dtype: Any = torch.float32,
) -> Any:
    """Shows `measure` the attention in batches, in tiles of so many images and queries; the tiles' memory is used again."""
    layers, total, _, tokens, _ = attention.shape
    for first in range(0, total, batch_size):
        batch = torch.tensor(attention[:, first : first + batch_size], dtype=dtype)
        for layer in range(layers):
            for image in range(0, batch.shape[1], images):
                for query in range(0, tokens, rows):
                    memory = batch[layer, image : image + images, :, query : query + rows].clone()
                    here, there = slice(image, image + len(memory)), slice(query, query + memory.shape[2])
                    measure.update(AttentionTile(layer, f"blocks.{layer}.attn", here, there, tokens, memory))
                    memory.fill_(torch.nan)
    return measure


tilings = st.fixed_dictionaries({"batch_size": st.integers(1, 4), "images": st.integers(1, 4), "rows": st.integers(1, 20)})


class FailsAfter:
    """Shows a measure so many tiles, then breaks off."""

    def __init__(self, measure: Any, tiles: int) -> None:
        self.measure, self.tiles = measure, tiles

    def update(self, tile: Any) -> None:
        if self.tiles == 0:
            raise RuntimeError("interrupted")
        self.tiles -= 1
        self.measure.update(tile)
