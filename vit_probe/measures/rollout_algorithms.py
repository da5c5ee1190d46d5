"""Three algorithms for the same row of a rollout; which one is cheapest depends on the number of tokens."""

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
"""`product`: keep the product of all layers' matrices so far. `maps`: keep each layer's matrix, and at the end multiply the
class token's row by them from the last layer to the first. `recomputed`: keep only queries and keys, and recompute the matrices
tile by tile at the end."""

# Largest number of tokens for which each algorithm is chosen, relative to the model's width.
_PRODUCT_LIMIT = 0.75
_MAPS_LIMIT = 4.0


def cheapest_algorithm(inputs: AttentionInputs) -> Algorithm:
    """Choose an algorithm by the number of tokens N and the width D of the queries, all heads together.

    `product` multiplies N x N matrices, which takes N^2 / (12 D^2 + 2 N D) of the operations of a standard layer (4 % at
    N = 3/4 D), and holds only one matrix. `maps` costs no time, but N / 2 D times the memory of the layer's queries and keys.
    `recomputed` takes about half of the time of the layer's attention again.

    Examples:
        >>> query = key = torch.empty(1, 6, 197, 64, device="meta")  # ViT-S/16
        >>> cheapest_algorithm(AttentionInputs(0, "blocks.0.attn", query, key, bias=None, scale=0.125))
        'product'
    """
    _, heads, tokens, dim = inputs.query.shape
    if tokens <= _PRODUCT_LIMIT * heads * dim:
        return "product"
    return "maps" if tokens <= _MAPS_LIMIT * heads * dim or inputs.bias is not None else "recomputed"


class FusedMaps:
    """Each layer's attention maps with the heads combined, assembled from tiles.

    Args:
        head_fusion: How the heads are combined.
        discard_ratio: Fraction of each image's entries that are then set to zero, smallest first.
        protected: A column that is neither counted nor set to zero; None for no column.

    Examples:
        >>> maps = torch.tensor([[0.9, 0.1], [0.4, 0.6]]).expand(1, 3, 2, 2)  # image, head, query, key
        >>> all_of = {"images": slice(0, 1), "heads": slice(0, 3), "queries": slice(0, 2)}
        >>> tile = AttentionTile(0, "blocks.0.attn", **all_of, num_heads=3, num_tokens=2, probabilities=maps)
        >>> FusedMaps("max", discard_ratio=0.5).add(tile)
        tensor([[[0.9000, 0.0000],
                 [0.0000, 0.6000]]])
    """

    def __init__(self, head_fusion: HeadFusion, discard_ratio: float, protected: int | None = None) -> None:
        self.head_fusion = head_fusion
        self.discard_ratio = discard_ratio
        self._protected = protected
        self._fused: Tensor | None = None

    def add(self, tile: AttentionTile) -> Float[Tensor, "image query key"] | None:
        """Add a tile, and return the maps of the images that it completes; None if it completes none."""
        if tile.queries.start == tile.heads.start == 0:
            self._fused = tile.probabilities.new_empty(len(tile.probabilities), tile.num_tokens, tile.num_tokens)
        assert self._fused is not None
        rows = self._fused[:, tile.queries]
        if self.head_fusion == "mean":
            fused_heads = tile.probabilities.sum(dim=1).div_(tile.num_heads)
            rows.copy_(fused_heads) if tile.heads.start == 0 else rows.add_(fused_heads)
        else:
            fused_heads = tile.probabilities.amax(dim=1) if self.head_fusion == "max" else tile.probabilities.amin(dim=1)
            combine = torch.maximum if self.head_fusion == "max" else torch.minimum
            rows.copy_(fused_heads if tile.heads.start == 0 else combine(rows, fused_heads))
        if tile.queries.stop < tile.num_tokens or tile.heads.stop < tile.num_heads:
            return None
        fused, self._fused = self._fused, None
        if self.discard_ratio:
            _discard(fused, self.discard_ratio, self._protected)
        return fused


class RolloutAlgorithm(Protocol):
    """How the rollout of one batch is computed while its layers arrive.

    Attributes:
        reached: Number of layers that each image has gone through.
    """

    @property
    def reached(self) -> list[int]: ...

    def begin_layer(self, inputs: AttentionInputs) -> bool:
        """Take a layer's queries and keys, and return whether its maps are needed."""
        ...

    def add(self, images: slice, fused: Float[Tensor, "image query key"]) -> None:
        """Add the fused maps of some images, layer by layer."""
        ...

    def rows(self, weights: Float[Tensor, "token"]) -> list[Float[Tensor, "token"]]:
        """`weights`, as a row vector, times the rollout of each image."""
        ...


class Product:
    """The product of all layers so far, one matrix per image."""

    def __init__(self) -> None:
        self._rollouts: list[Tensor] = []
        self.reached: list[int] = []

    def begin_layer(self, inputs: AttentionInputs) -> bool:
        return True

    def add(self, images: slice, fused: Float[Tensor, "image query key"]) -> None:
        # With s the row sums of F, A = (F + I) / (s + 1), so A R = (F R + R) / (s + 1).
        row_sums = fused.sum(dim=-1, keepdim=True) + 1
        if images.start == len(self._rollouts):
            fused.diagonal(dim1=1, dim2=2).add_(1)
            self._rollouts += fused.div_(row_sums).unbind()
            self.reached += [1] * len(fused)
            return
        rollouts = torch.stack(self._rollouts[images])
        self._rollouts[images] = torch.baddbmm(rollouts, fused, rollouts).div_(row_sums).unbind()
        self.reached[images] = [reached + 1 for reached in self.reached[images]]

    def rows(self, weights: Float[Tensor, "token"]) -> list[Float[Tensor, "token"]]:
        with torch.autocast(self._rollouts[0].device.type, enabled=False):  # which would multiply in half precision
            return [weights.to(rollout) @ rollout for rollout in self._rollouts]


class RightToLeft:
    """A row vector times the layers' matrices from the last layer to the first, at the end of the batch.

    Until then it keeps each layer's maps, or its queries and keys if the algorithm is `recomputed`.

    Args:
        algorithm: `maps` or `recomputed`.
        new_fused_maps: Returns a new `FusedMaps`.
    """

    def __init__(self, algorithm: Algorithm, new_fused_maps: Callable[[], FusedMaps]) -> None:
        self._algorithm = algorithm
        self._new_fused_maps = new_fused_maps
        self._layers: list[AttentionInputs | list[Tensor]] = []

    @property
    def reached(self) -> list[int]:
        images = [layer.query.shape[0] if isinstance(layer, AttentionInputs) else len(layer) for layer in self._layers]
        return [sum(image < count for count in images) for image in range(max(images, default=0))]

    def begin_layer(self, inputs: AttentionInputs) -> bool:
        if self._algorithm == "maps" or inputs.bias is not None:
            self._layers.append([])
            return True
        # A copy, since the model's own may be views that keep a larger tensor alive.
        copies = {name: getattr(inputs, name).clone(memory_format=torch.contiguous_format) for name in ("query", "key")}
        self._layers.append(replace(inputs, **copies))
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
                        row = self._propagate_recomputed(row, layer, image, compute)
                    elif image < len(layer):
                        row = _propagate(row, layer[image])
                rows.append(row)
        return rows

    def _propagate_recomputed(self, row: Tensor, layer: AttentionInputs, image: int, compute: TiledAttention) -> Tensor:
        fused_maps = self._new_fused_maps()
        one_image = slice(image, image + 1)
        if fused_maps.head_fusion != "mean" or fused_maps.discard_ratio:
            whole = _WholeMap(fused_maps)
            compute(replace(layer, query=layer.query[one_image], key=layer.key[one_image]), None, [whole])
            assert whole.fused is not None
            return _propagate(row, whole.fused[0])
        nonzero = row.nonzero()  # in the last layer, only the class token: the other queries need not be computed
        first, last = int(nonzero.min()), int(nonzero.max()) + 1
        sums = _WeightedSum(row[first:last])
        compute(replace(layer, query=layer.query[one_image, :, first:last], key=layer.key[one_image]), None, [sums])
        # The mean over heads of softmax weights has rows that sum to 1, so A = (F + I) / 2.
        return (row + sums.total / layer.query.shape[1]) / 2


class _WholeMap:
    """Observer that keeps the fused map of a single image."""

    def __init__(self, fused_maps: FusedMaps) -> None:
        self._fused_maps = fused_maps
        self.fused: Tensor | None = None

    def update(self, tile: AttentionTile) -> None:
        self.fused = self._fused_maps.add(tile)


class _WeightedSum:
    """Observer that sums the attention of a single image over heads and queries, each query times its weight."""

    def __init__(self, weights: Float[Tensor, "query"]) -> None:
        self._weights = weights
        self.total: Tensor | float = 0.0

    def update(self, tile: AttentionTile) -> None:
        heads = tile.probabilities[0]
        weights = self._weights[tile.queries].to(heads).expand(len(heads), 1, -1)
        self.total = self.total + torch.bmm(weights, heads).sum(dim=(0, 1)).to(self._weights)


def _propagate(row: Float[Tensor, "token"], fused: Float[Tensor, "query key"]) -> Float[Tensor, "token"]:
    """`row` times A, the normalised sum of a layer's fused map and the identity."""
    weights = row / (fused.sum(dim=-1) + 1)
    return (weights.to(fused) @ fused).to(row) + weights


def _discard(fused: Float[Tensor, "image query key"], ratio: float, protected: int | None) -> None:
    """Set the smallest entries outside the `protected` column to zero, image by image, in place."""
    for matrix in fused:
        candidates = matrix.clone()
        if protected is not None:
            candidates[:, protected] = torch.inf  # never among the smallest
        count = int(ratio * (matrix.numel() - (protected is not None) * len(matrix)))
        if count:
            smallest = torch.topk(candidates.flatten(), count, largest=False, sorted=False).indices
            matrix.view(-1)[smallest] = 0
