"""Softmax attention computed tile by tile, each tile shown to observers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["AttentionObserver", "AttentionTile", "TiledAttention"]


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """The attention of some queries of some images in one layer.

    Args:
        layer: Number of the self-attention layer, from 0, in the order of the first calls.
        name: Path of the module that made the call, such as `blocks.0.attn`.
        images: Which images of the batch; where attention is within windows, which windows: those of the first image, then
            those of the second, and so on.
        queries: Which query tokens.
        num_tokens: Tokens of the sequence, or of a window.
        probabilities: Softmax weights over all tokens, in float32 or float64. The memory is used again for the next tile:
            reduce it or copy it, and do not write to it.
    """

    layer: int
    name: str
    images: slice
    queries: slice
    num_tokens: int
    probabilities: Float[Tensor, "image head query key"]


class AttentionObserver(Protocol):
    """What `attention_hooks` shows attention to. Tiles come layer by layer, then by images, then by queries, each in order."""

    def update(self, tile: AttentionTile) -> None: ...


class TiledAttention:
    """Computes attention in one workspace of bounded size, which is kept: fresh pages cost more than the arithmetic.

    Args:
        observers: Shown each tile in turn.
        tile_bytes: Upper bound of a tile's size; one query of one image is the least.
    """

    def __init__(self, observers: tuple[AttentionObserver, ...], tile_bytes: int) -> None:
        self._observers = observers
        self._tile_bytes = tile_bytes
        self._workspace = torch.empty(0)

    def __call__(
        self,
        layer: int,
        name: str,
        query: Float[Tensor, "image head query dim"],
        key: Float[Tensor, "image head key dim"],
        value: Float[Tensor, "image head key value_dim"] | None,
        bias: Float[Tensor, "image head query key"] | None,
        scale: float | None,
    ) -> Float[Tensor, "image head query value_dim"] | None:
        """Shows every tile to the observers; returns probabilities @ value where there is a value."""
        batch, heads, tokens, dim = query.shape
        scale = 1 / math.sqrt(dim) if scale is None else scale
        dtype = torch.promote_types(query.dtype, torch.float32)
        workspace = self._reserve(dtype, query.device)
        at_once, rows = _tile_shape(batch, heads, tokens, len(workspace))
        if at_once == 0:
            workspace = workspace.new_empty(heads * tokens)
            at_once = rows = 1
        output = None
        if value is not None:  # laid out as the fused kernels do, so that the heads merge without a copy
            output = value.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        for images in _slices(batch, at_once):
            count = images.stop - images.start
            # For one image these are views; several are copied, which costs little for the short sequences it is done for.
            group_query, group_key = (t[images].reshape(count * heads, tokens, dim).to(dtype) for t in (query, key))
            group_value = None if value is None else value[images].reshape(count * heads, tokens, -1).to(dtype)
            for queries in _slices(tokens, rows):
                length = queries.stop - queries.start
                scores = workspace[: count * heads * length * tokens].view(count * heads, length, tokens)
                torch.baddbmm(scores, group_query[:, queries], group_key.mT, beta=0, alpha=scale, out=scores)
                tile = scores.view(count, heads, length, tokens)
                if bias is None:
                    torch.softmax(scores, dim=-1, out=scores)
                else:
                    tile += bias[images, :, queries]
                    empty = scores.amax(dim=-1, keepdim=True) == -torch.inf
                    torch.softmax(scores, dim=-1, out=scores)
                    scores.masked_fill_(empty, 0)  # a query that may attend to nothing attends to nothing
                for observer in self._observers:
                    observer.update(AttentionTile(layer, name, images, queries, tokens, tile))
                if output is not None and group_value is not None:
                    output[images, :, queries] = torch.bmm(scores, group_value).view(count, heads, length, -1).to(output.dtype)
        return output

    def _reserve(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._workspace.dtype != dtype or self._workspace.device != device or self._workspace.numel() == 0:
            with torch.inference_mode(False):
                self._workspace = torch.empty(max(1, self._tile_bytes // dtype.itemsize), dtype=dtype, device=device)
        return self._workspace


def _tile_shape(batch: int, heads: int, tokens: int, elements: int) -> tuple[int, int]:
    """Images and queries of a tile: whole images where one fits, else queries of one image; (0, 0) where not one query fits."""
    whole = elements // (heads * tokens * tokens)
    if whole:
        return min(batch, whole), tokens
    rows = elements // (heads * tokens)
    if rows == 0:
        return 0, 0
    return 1, math.ceil(tokens / math.ceil(tokens / rows))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
