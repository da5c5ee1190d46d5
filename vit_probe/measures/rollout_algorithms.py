"""Three ways to the same row of a rollout, of which the cheapest depends on the number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from vit_probe.attention.tiles import TILE_BYTES, AttentionInputs, AttentionTile, TiledAttention
from vit_probe.measures.base.reduce import wide

__all__ = ["Algorithm", "FusedMaps", "HeadFusion", "Product", "RightToLeft", "cheapest_algorithm"]

HeadFusion = Literal["mean", "max", "min"]
Algorithm = Literal["product", "maps", "recomputed"]
"""`product`: layer by layer, the product of all matrices so far. `maps`: each layer's matrix is kept, and at the end the class
token's row goes back through them. `recomputed`: only queries and keys are kept, and the matrices made again tile by tile."""

_PRODUCT = 0.75
_MAPS = 4.0


def cheapest_algorithm(inputs: AttentionInputs) -> Algorithm:
    """Chooses by the number of tokens N and the width of the queries D.

    A product of N x N matrices has N^2 / (12 D^2 + 2 N D) of the operations of a usual layer (4 % where N = 3/4 D), and only
    one matrix is held. A matrix of each layer costs no time, but has N / 2 D times the size of the layer's queries and keys,
    which take about half of the layer's attention again.
    """
    _, heads, tokens, dim = inputs.query.shape
    if tokens <= _PRODUCT * heads * dim:
        return "product"
    return "maps" if tokens <= _MAPS * heads * dim or inputs.bias is not None else "recomputed"


class FusedMaps:
    """Each layer's attention with its heads made one, put together from tiles.

    Args:
        head_fusion: How.
        discard_ratio: Part of each image's entries that is then set to zero, the smallest first.
        protected: Columns, from the first, that are neither counted nor set to zero.
    """

    def __init__(self, head_fusion: HeadFusion, discard_ratio: float, protected: int) -> None:
        self.head_fusion = head_fusion
        self.discard_ratio = discard_ratio
        self._protected = protected
        self._fused: Tensor | None = None

    def add(self, tile: AttentionTile) -> Float[Tensor, "image query key"] | None:
        """The maps of the images that the tile completes; None if it completes none."""
        if tile.queries.start == tile.heads.start == 0:
            self._fused = tile.probabilities.new_empty(len(tile.probabilities), tile.num_tokens, tile.num_tokens)
        assert self._fused is not None
        rows = self._fused[:, tile.queries]
        if self.head_fusion == "mean":
            part = tile.probabilities.sum(dim=1).div_(tile.num_heads)
            rows.copy_(part) if tile.heads.start == 0 else rows.add_(part)
        else:
            part = tile.probabilities.amax(dim=1) if self.head_fusion == "max" else tile.probabilities.amin(dim=1)
            larger = torch.maximum if self.head_fusion == "max" else torch.minimum
            rows.copy_(part if tile.heads.start == 0 else larger(rows, part))
        if tile.queries.stop < tile.num_tokens or tile.heads.stop < tile.num_heads:
            return None
        fused, self._fused = self._fused, None
        if self.discard_ratio:
            _discard(fused, self.discard_ratio, protected=self._protected)
        return fused


class RolloutAlgorithm(Protocol):
    """What goes on between the first layer of a batch and the last.

    Attributes:
        reached: How many layers each image has gone through.
    """

    @property
    def reached(self) -> list[int]: ...

    def begin_layer(self, inputs: AttentionInputs) -> bool:
        """Told of each layer; whether its maps are needed."""
        ...

    def add(self, images: slice, fused: Float[Tensor, "image query key"]) -> None:
        """Given the maps of some images, layer by layer."""
        ...

    def rows(self, weights: Float[Tensor, "token"]) -> list[Float[Tensor, "token"]]:
        """`weights` times the rollout of each image."""
        ...


class Product:
    """Holds the product of all layers so far, a matrix an image."""

    def __init__(self) -> None:
        self._rollouts: list[Tensor] = []
        self.reached: list[int] = []

    def begin_layer(self, inputs: AttentionInputs) -> bool:
        return True

    def add(self, images: slice, fused: Float[Tensor, "image query key"]) -> None:
        # A = (F + I) / (row sum of F, + 1), so A R = (F R + R) / (row sum of F, + 1).
        row_sums = fused.sum(dim=-1, keepdim=True) + 1
        if images.start == len(self._rollouts):
            fused.diagonal(dim1=1, dim2=2).add_(1)
            self._rollouts += fused.div_(row_sums).unbind()
            self.reached += [1] * len(fused)
            return
        before = torch.stack(self._rollouts[images])
        self._rollouts[images] = torch.baddbmm(before, fused, before).div_(row_sums).unbind()
        self.reached[images] = [reached + 1 for reached in self.reached[images]]

    def rows(self, weights: Float[Tensor, "token"]) -> list[Float[Tensor, "token"]]:
        with torch.autocast(self._rollouts[0].device.type, enabled=False):
            return [weights.to(rollout) @ rollout for rollout in self._rollouts]


class RightToLeft:
    """Keeps each layer's maps, or where the way is `recomputed` its queries and keys, and goes back through them at the end.

    Args:
        algorithm: `maps` or `recomputed`.
        fuse: Makes what puts maps together.
    """

    def __init__(self, algorithm: Algorithm, fuse: Callable[[], FusedMaps]) -> None:
        self._algorithm = algorithm
        self._fuse = fuse
        self._layers: list[AttentionInputs | list[Tensor]] = []

    @property
    def reached(self) -> list[int]:
        images = [layer.query.shape[0] if isinstance(layer, AttentionInputs) else len(layer) for layer in self._layers]
        return [sum(image < count for count in images) for image in range(max(images, default=0))]

    def begin_layer(self, inputs: AttentionInputs) -> bool:
        if self._algorithm == "maps" or inputs.bias is not None:
            self._layers.append([])
            return True
        # A copy, as the model's own may be parts of something larger.
        clone = {name: getattr(inputs, name).clone(memory_format=torch.contiguous_format) for name in ("query", "key")}
        self._layers.append(replace(inputs, **clone))
        return False

    def add(self, images: slice, fused: Float[Tensor, "image query key"]) -> None:
        layer = self._layers[-1]
        assert isinstance(layer, list)
        layer += fused.unbind()

    def rows(self, weights: Float[Tensor, "token"]) -> list[Float[Tensor, "token"]]:
        rows = []
        first = self._layers[0]
        device = (first.query if isinstance(first, AttentionInputs) else first[0]).device
        compute = TiledAttention(TILE_BYTES)
        with torch.autocast(device.type, enabled=False):
            for image in range(len(self.reached)):
                row = weights.to(device, wide(device))
                for layer in reversed(self._layers):
                    if isinstance(layer, AttentionInputs):
                        row = self._through_inputs(row, layer, image, compute)
                    elif image < len(layer):
                        row = _through_map(row, layer[image])
                rows.append(row)
        return rows

    def _through_inputs(self, row: Tensor, layer: AttentionInputs, image: int, compute: TiledAttention) -> Tensor:
        fuse = self._fuse()
        only = slice(image, image + 1)
        if fuse.head_fusion != "mean" or fuse.discard_ratio:
            whole = _Whole(fuse)
            compute(replace(layer, query=layer.query[only], key=layer.key[only]), None, [whole])
            assert whole.fused is not None
            return _through_map(row, whole.fused[0])
        asked = row.nonzero()  # of the last layer only the class token's query
        first, last = int(asked.min()), int(asked.max()) + 1
        sums = _WeightedSum(row[first:last])
        compute(replace(layer, query=layer.query[only, :, first:last], key=layer.key[only]), None, [sums])
        return (row + sums.total / layer.query.shape[1]) / 2


class _Whole:
    """Keeps the map of the one image that it is shown."""

    def __init__(self, fuse: FusedMaps) -> None:
        self._fuse = fuse
        self.fused: Tensor | None = None

    def update(self, tile: AttentionTile) -> None:
        self.fused = self._fuse.add(tile)


class _WeightedSum:
    """The sum over heads and queries of the one image that it is shown, each query with its weight."""

    def __init__(self, weights: Float[Tensor, "query"]) -> None:
        self._weights = weights
        self.total: Tensor | float = 0.0

    def update(self, tile: AttentionTile) -> None:
        heads = tile.probabilities[0]
        weights = self._weights[tile.queries].to(heads).expand(len(heads), 1, -1)
        self.total = self.total + torch.bmm(weights, heads).sum(dim=(0, 1)).to(self._weights)


def _through_map(row: Float[Tensor, "token"], fused: Float[Tensor, "query key"]) -> Float[Tensor, "token"]:
    weights = row / (fused.sum(dim=-1) + 1)
    return (weights.to(fused) @ fused).to(row) + weights


def _discard(fused: Float[Tensor, "image query key"], ratio: float, *, protected: int) -> None:
    """Sets the smallest entries outside the first `protected` columns to zero, image by image, in place."""
    for matrix in fused[:, :, protected:]:
        candidates = matrix.reshape(-1)
        count = int(ratio * len(candidates))
        if count:
            smallest = torch.topk(candidates, count, largest=False, sorted=False).indices
            matrix[smallest // matrix.shape[1], smallest % matrix.shape[1]] = 0
