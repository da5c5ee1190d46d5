"""Random attention, fed to a measure as `attention_hooks` would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

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
    heads: int = 100,
    disposable: bool = False,
    dtype: Any = torch.float32,
) -> Any:
    """Shows `measure` the attention in batches, in tiles of so many images, queries and heads, and spoils each tile after.

    Before that it sees to it that a measure writes to disposable tiles only.
    """
    layers, total = attention.shape[:2]
    for first in range(0, total, batch_size):
        batch = torch.tensor(attention[:, first : first + batch_size], dtype=dtype)
        for layer in range(layers):
            for tile in tiles_of(batch[layer], layer, images, rows, heads):
                held = [memory for memory in (tile.probabilities, tile.scores) if memory is not None]
                before = [memory.clone() for memory in held]
                measure.update(replace(tile, disposable=disposable))
                assert disposable or all(map(torch.equal, held, before))
                for memory in held:
                    memory.fill_(torch.nan)
    return measure


def tiles_of(attention: Tensor, layer: int, images: int, rows: int, heads: int) -> Iterator[AttentionTile]:
    """Tiles of a layer as `attention_hooks` cuts them, with scores; each has memory of its own."""
    batch, num_heads, tokens, _ = attention.shape
    scores = scores_of(attention)
    for image in range(0, batch, images):
        for query in range(0, tokens, rows):
            for head in range(0, num_heads, heads):
                part = (slice(image, image + images), slice(head, head + heads), slice(query, query + rows))
                probabilities = attention[part].clone()
                count, some, length, _ = probabilities.shape
                places = (slice(image, image + count), slice(head, head + some), slice(query, query + length))
                name = f"blocks.{layer}.attn"
                yield AttentionTile(layer, name, *places, num_heads, tokens, probabilities, scores[part].clone())


def scores_of(attention: Tensor) -> Tensor:
    """What softmax makes `attention` of: 0 where it is largest, and finite where it is 0."""
    logarithms = attention.log()
    return (logarithms - logarithms.amax(dim=-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).min)


def merged_shards(make: Callable[[], Any], attention: np.ndarray, order: list[int], cuts: list[int]) -> Any:
    """What measures have seen together of which each saw the images between two cuts, merged in some order."""
    bounds = [0, *cuts, attention.shape[1]]
    shards = [feed(make(), attention[:, bounds[i] : bounds[i + 1]]) for i in order]  # some of them empty
    for shard in shards[1:]:
        shards[0].merge(shard)
    return shards[0]


tilings = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 4),
        "images": st.integers(1, 4),
        "rows": st.integers(1, 20),
        "heads": st.integers(1, 3),
        "disposable": st.booleans(),
    }
)


class FailsAfter:
    """Shows a measure so many tiles, then breaks off."""

    def __init__(self, measure: Any, tiles: int) -> None:
        self.measure, self.tiles = measure, tiles

    def update(self, tile: Any) -> None:
        if self.tiles == 0:
            raise RuntimeError("interrupted")
        self.tiles -= 1
        self.measure.update(tile)
