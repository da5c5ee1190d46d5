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
    """Random weights (layer, batch, head, query, key), rows summing to 1, rounded to float32 and returned in float64."""
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
    """Show `measure` the attention in batches, in tiles of at most `images` images, `rows` queries and `heads` heads.

    Checks that a measure writes to disposable tiles only, and spoils each tile afterwards, as `attention_hooks` does when it
    uses the memory again.
    """
    layers, total = attention.shape[:2]
    for first in range(0, total, batch_size):
        batch = torch.tensor(attention[:, first : first + batch_size], dtype=dtype)
        for layer in range(layers):
            for tile in tiles_of(batch[layer], layer, images, rows, heads):
                before = tile.probabilities.clone()
                measure.update(replace(tile, disposable=disposable))
                assert disposable or torch.equal(tile.probabilities, before)
                tile.probabilities.fill_(torch.nan)
    return measure


def tiles_of(attention: Tensor, layer: int, images: int, rows: int, heads: int) -> Iterator[AttentionTile]:
    """Yield the tiles of a layer in the order of `attention_hooks`, each in memory of its own."""
    batch, num_heads, tokens, _ = attention.shape
    for image in range(0, batch, images):
        for query in range(0, tokens, rows):
            for head in range(0, num_heads, heads):
                part = (slice(image, image + images), slice(head, head + heads), slice(query, query + rows))
                probabilities = attention[part].clone()
                count, some, length, _ = probabilities.shape
                places = (slice(image, image + count), slice(head, head + some), slice(query, query + length))
                name = f"blocks.{layer}.attn"
                yield AttentionTile(layer, name, *places, num_heads, tokens, probabilities)


def merged_shards(make: Callable[[], Any], attention: np.ndarray, order: list[int], cuts: list[int]) -> Any:
    """Cut the images into shards, show each shard to a measure of its own, and merge the measures in some order."""
    bounds = [0, *cuts, attention.shape[1]]
    shards = [feed(make(), attention[:, bounds[i] : bounds[i + 1]]) for i in order]  # some are empty
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


class Tokens:
    """An observer that keeps the patch tokens after each block."""

    def __init__(self) -> None:
        self.layers: dict[int, list[np.ndarray]] = {}

    def update(self, tile: AttentionTile) -> None:
        """Do nothing."""

    def begin_layer(self, inputs: Any) -> bool:
        return False

    def update_tokens(self, layer: int, tokens: Tensor) -> None:
        self.layers.setdefault(layer, []).append(tokens.cpu().numpy().copy())

    def of(self, layer: int) -> np.ndarray:
        """(image, patch, dim)"""
        return np.concatenate(self.layers[layer])


def arrays_of(result: Any) -> dict[str, np.ndarray]:
    """All arrays of a result, those in dictionaries as `field/name`."""
    arrays: dict[str, np.ndarray] = {}
    for field, value in vars(result).items():
        named = {field: value} if not isinstance(value, dict) else {f"{field}/{name}": one for name, one in value.items()}
        arrays |= {name: one for name, one in named.items() if isinstance(one, np.ndarray)}
    return arrays


def of_tokens(function: Any, tokens: Tensor, rows: int, cols: int, **options: Any) -> np.ndarray:
    """The values of each image that a measure per layer has of these tokens (image, patch, dim)."""

    class Run:
        layers = ("layer",)

        class layout:
            @staticmethod
            def grid_of(layer: int) -> TokenGrid:
                return TokenGrid(rows, cols, (8, 8), 0, False)

    measure = function.spec.start(Run, **(dict(function.spec.options) | {"per_image": True} | options))
    measure.begin_batch()
    measure.update_tokens(0, tokens)
    measure.end_batch()
    return measure.compute().per_image[function.spec.name][:, 0]


class FailsAfter:
    """Passes some tiles on to a measure, then raises."""

    def __init__(self, measure: Any, tiles: int) -> None:
        self.measure, self.tiles = measure, tiles

    def update(self, tile: Any) -> None:
        if self.tiles == 0:
            raise RuntimeError("interrupted")
        self.tiles -= 1
        self.measure.update(tile)
