"""Softmax attention computed tile by tile, each tile shown to observers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "TILE_BYTES",
    "AttentionInputs",
    "AttentionObserver",
    "AttentionTile",
    "LayerObserver",
    "TiledAttention",
    "Workspace",
]

TILE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """The attention of some queries of some heads and images in one layer.

    Args:
        layer: Number of the self-attention layer, from 0, in the order of the first calls.
        name: Path of the module that made the call, such as `blocks.0.attn`.
        images: Which images of the batch; where attention is within windows, which windows: those of the first image, then
            those of the second, and so on.
        heads: Which heads.
        queries: Which query tokens.
        num_heads: Number of heads of the layer.
        num_tokens: Number of tokens of the sequence, or of a window.
        probabilities: Softmax weights over all tokens, in float32 or float64. The memory is reused for the next tile: reduce it
            or copy it, and do not write to it unless the tile is `disposable`.
        disposable: Whether this observer is the last one to read the tile, and so may overwrite it.
    """

    layer: int
    name: str
    images: slice
    heads: slice
    queries: slice
    num_heads: int
    num_tokens: int
    probabilities: Float[Tensor, "image head query key"]
    disposable: bool = False


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """The inputs of a layer's attention.

    Args:
        layer: As in `AttentionTile`.
        name: As in `AttentionTile`.
        query, key: As the layer's kernel receives them, with repeated heads where heads share keys. Where the model computes
            the softmax in code of its own they are unknown, and of width 0: the bias holds the scores.
        bias: Added to the scaled products; None if there is none.
        scale: Factor of the products.
    """

    layer: int
    name: str
    query: Float[Tensor, "image head query dim"]
    key: Float[Tensor, "image head key dim"]
    bias: Float[Tensor, "image head query key"] | None
    scale: float


class AttentionObserver(Protocol):
    """An object to which `attention_hooks` shows attention: by layers, then by images, queries and heads, each in order."""

    def update(self, tile: AttentionTile) -> None: ...


@runtime_checkable
class LayerObserver(AttentionObserver, Protocol):
    """An observer that is asked before each layer whether it needs its tiles. If no observer does, they are not computed."""

    def begin_layer(self, inputs: AttentionInputs) -> bool: ...


class Workspace:
    """Memory that is reused, since touching fresh pages costs more than the arithmetic done on them."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; the same memory each time, unless a larger one or another type is needed."""
        size = math.prod(shape)
        if self._memory.numel() < size or self._memory.dtype != dtype or self._memory.device != device:
            with torch.inference_mode(False):
                self._memory = torch.empty(size, dtype=dtype, device=device)
        return self._memory[:size].view(*shape)


class TiledAttention:
    """Softmax attention computed tile by tile, each in the same memory.

    Args:
        tile_bytes: Upper bound of a tile's size; one query of one head of one image is the least.
    """

    def __init__(self, tile_bytes: int) -> None:
        self._tile_bytes = tile_bytes
        self._scores = Workspace()

    def __call__(
        self,
        inputs: AttentionInputs,
        value: Float[Tensor, "image head key value_dim"] | None,
        observers: Sequence[AttentionObserver],
    ) -> Float[Tensor, "image head query value_dim"] | None:
        """Show every tile to the observers; return probabilities @ value if there is a value."""
        query, key, bias = inputs.query, inputs.key, inputs.bias
        batch, heads, length, _ = query.shape
        tokens = key.shape[-2]
        dtype = torch.promote_types(query.dtype, torch.float32)
        elements = self._tile_bytes // dtype.itemsize
        images_per_tile, heads_per_tile, queries_per_tile = _tile_shape(batch, heads, length, tokens, elements)
        output = None
        if value is not None:  # laid out as the fused kernels do, so that the heads merge without a copy
            output = value.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        for images in _slices(batch, images_per_tile):
            count = images.stop - images.start
            # Copied head by head: products of rows that are far apart in memory take longer than the copies.
            group_query, group_key = (t[images].to(dtype).contiguous().flatten(0, 1) for t in (query, key))
            group_value = None if value is None else value[images].to(dtype).contiguous().flatten(0, 1)
            for queries in _slices(length, queries_per_tile):
                for some in _slices(heads, heads_per_tile):
                    shape = (count, some.stop - some.start, queries.stop - queries.start, tokens)
                    group = slice(some.start, some.start + count * shape[1])  # several images come with all their heads
                    matrices = (count * shape[1], *shape[2:])
                    scores = self._scores.take(matrices, dtype, query.device)
                    products = group_query[group, queries], group_key[group].mT
                    torch.baddbmm(scores, *products, beta=0, alpha=inputs.scale, out=scores)
                    if bias is None:
                        probabilities = torch.softmax(scores, dim=-1, out=scores)
                    else:
                        scores.view(shape).add_(bias[images, some, queries])
                        sees_nothing = scores.amax(dim=-1, keepdim=True) == -torch.inf
                        # The softmax of nothing but -inf is NaN; the fused kernels return zeros there.
                        probabilities = torch.softmax(scores, dim=-1, out=scores).masked_fill_(sees_nothing, 0)
                    places = (inputs.layer, inputs.name, images, some, queries, heads, tokens)
                    tile = AttentionTile(*places, probabilities.view(shape))
                    if output is not None and group_value is not None:
                        product = torch.bmm(probabilities, group_value[group])
                        output[images, some, queries] = product.view(*shape[:3], -1).to(output.dtype)
                    for observer in observers[:-1]:
                        observer.update(tile)
                    for observer in observers[-1:]:
                        observer.update(replace(tile, disposable=True))
        return output


_JOINED = 4  # several images share a tile, which takes a copy, up to this fraction of it: small products are slow
_MIN_QUERIES = 64  # with fewer queries, a product with all keys is bound by reading the keys


def _tile_shape(batch: int, heads: int, queries: int, tokens: int, elements: int) -> tuple[int, int, int]:
    """Images, heads and queries of a tile: whole images if one fits, else queries of all heads or of one, in equal parts."""
    whole = elements // (heads * queries * tokens)
    if whole:
        return min(batch, max(1, whole // _JOINED)), heads, queries
    heads_per_tile = heads if elements >= heads * min(queries, _MIN_QUERIES) * tokens else 1
    rows = max(1, min(queries, elements // (heads_per_tile * tokens)))
    return 1, heads_per_tile, math.ceil(queries / math.ceil(queries / rows))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
