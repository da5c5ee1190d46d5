"""From tiles of attention to one value per image: means over patch queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vit_probe.attention.tiles import AttentionTile, Workspace
from vit_probe.errors import InputError
from vit_probe.tokens.grid import OffsetFunction, OffsetTable, TokenGrid, Windows

__all__ = [
    "OffsetMeans",
    "PatchAttention",
    "PerQuery",
    "QueryMeans",
    "QueryValues",
    "ReceivedAttention",
    "ReceivedMeans",
    "check_values",
    "has_mass",
    "read_only",
    "wide",
]

_KEPT_PAIRS = 1 << 20  # pairs of patches whose values are kept, 4 MB; of larger grids only those of a tile


@dataclass(frozen=True)
class PatchAttention:
    """The attention of some patch queries to all tokens.

    Axes: `image` runs over images, or over the windows of a layer that attends within windows; `query` over some patches;
    `token` over all tokens of the sequence or window.

    Args:
        weights: Softmax weights over all tokens; each row sums to 1. Do not write to it: the memory is shared.
        grid: Where the tokens of this layer lie.
        patch_index: Which patch each token of a window is, counted row by row, -1 for padding; None where attention is over
            the whole image, whose patches follow the prefix tokens row by row.
        query_index: Which tokens the queries are.

    Attributes:
        to_patches: (image, head, query, patch), the weights on patches; in a window on all its tokens, 0 on padding.
        to_prefix: (image, head, query, prefix), the weights on prefix tokens; in a window the sum over its padding. What is
            missing to a sum of 1 with the patches goes to suffix tokens, of which few models have any.
        to_self: (image, head, query), the weight of each query on itself.
        patch_mass: (image, head, query), the weight of each query on all patches.
        renormalized: `to_patches`, rescaled to sum to 1 for each query; 0 for queries without `has_patch_mass`.
        has_patch_mass: (image, head, query), which queries give patches so much weight that rounding to 0 does not distort it.
        dx, dy: (query, patch), offsets in pixels from each query to each patch, as `to_patches` has them; dx grows to the
            right and dy downwards. In windows (window, 1, query, token).
    """

    weights: Float[Tensor, "image head query token"]
    grid: TokenGrid
    query_index: slice
    patch_index: Int[Tensor, "image token"] | None = None
    _pairs: Callable[[OffsetFunction, bool], Tensor] | None = field(default=None, repr=False)

    @cached_property
    def to_patches(self) -> Float[Tensor, "image head query patch"]:
        if self.patch_index is None:
            return self.weights[..., self.grid.patch_tokens]
        return self.weights * self._is_patch

    @cached_property
    def to_prefix(self) -> Float[Tensor, "image head query prefix"]:
        if self.patch_index is None:
            return self.weights[..., : self.grid.num_prefix_tokens]
        return (self.weights * ~self._is_patch).sum(dim=-1, keepdim=True)

    @cached_property
    def patch_mass(self) -> Float[Tensor, "image head query"]:
        return self.to_patches.sum(dim=-1)

    @cached_property
    def has_patch_mass(self) -> Bool[Tensor, "image head query"]:
        return has_mass(self.patch_mass)

    @cached_property
    def renormalized(self) -> Float[Tensor, "image head query patch"]:
        return torch.where(self.has_patch_mass[..., None], self.to_patches / self.patch_mass[..., None], 0)

    @property
    def to_self(self) -> Float[Tensor, "image head query"]:
        return self.weights.diagonal(offset=self.query_index.start, dim1=-2, dim2=-1)

    @cached_property
    def dx(self) -> Float[Tensor, "*#window query patch"]:
        return self._offsets(_right)

    @cached_property
    def dy(self) -> Float[Tensor, "*#window query patch"]:
        return self._offsets(_down)

    def sum_where(
        self, values: Float[Tensor, "image head query *values"], has_value: Bool[Tensor, "image head query"]
    ) -> QuerySum:
        """The sum over the patch queries that have a value; the others are left out of the mean.

        Args:
            values: Of each query.
            has_value: Which queries have one.
        """
        counts = has_value if self.patch_index is None else has_value & self._query_is_patch
        shape = (*counts.shape, *[1] * (values.ndim - counts.ndim))
        total = torch.where(counts.view(shape), values, 0).sum(dim=2, dtype=wide(values.device))
        return QuerySum(total, counts.sum(dim=2))

    def align(
        self, weights: Float[Tensor, "image head query patch"], has_value: Bool[Tensor, "image head query"] | None = None
    ) -> QuerySum:
        """Maps like `to_patches` moved so that each query lies in the centre, summed over the queries.

        Args:
            weights: Of each query on each patch, as `to_patches` has them.
            has_value: Which queries have such a map; the weights of others must be 0. All if None.

        Returns:
            (image, head, 2 rows - 1, 2 cols - 1): entry (rows - 1 + v, cols - 1 + u) is the weight on the patch v rows below
            and u columns right of the query.
        """
        count = None if has_value is None else self.sum_where(has_value, has_value).count
        rows, cols = self.grid.rows, self.grid.cols
        images, heads = weights.shape[:2]
        total = weights.new_zeros(images, heads, 2 * rows - 1, 2 * cols - 1)
        if self.patch_index is None:
            maps = weights.unflatten(-1, (rows, cols))
            # One shifted addition per query is far cheaper than a map of its own for each.
            for index, query in enumerate(range(*self.query_index.indices(self.query_index.stop))):
                row, col = divmod(query - self.grid.num_prefix_tokens, cols)
                total[..., rows - 1 - row : 2 * rows - 1 - row, cols - 1 - col : 2 * cols - 1 - col] += maps[:, :, index]
            return QuerySum(total, count)
        for window, patches in enumerate(self.patch_index.to(weights.device)):
            queries = patches[self.query_index]
            down = patches // cols - (queries // cols)[:, None] + rows - 1
            right = patches % cols - (queries % cols)[:, None] + cols - 1
            is_pair = (queries >= 0)[:, None] & (patches >= 0)
            places = (down * (2 * cols - 1) + right)[is_pair]
            total[window].flatten(1).index_add_(1, places, weights[window][:, is_pair])
        return QuerySum(total, count)

    def _offsets(self, function: OffsetFunction, in_patches: bool = False) -> Float[Tensor, "*#window query patch"]:
        """A function of the offsets from each query to each patch, in pixels or patches."""
        if self._pairs is not None:
            return self._pairs(function, in_patches)
        start = self.query_index.start - self.grid.num_prefix_tokens
        stop = self.query_index.stop - self.grid.num_prefix_tokens
        table = OffsetTable(self.grid, function, in_patches=in_patches)
        return table.rows(start, stop, device=self.weights.device).to(self.weights)

    @property
    def _is_patch(self) -> Tensor:
        assert self.patch_index is not None
        return (self.patch_index >= 0)[:, None, None, :].to(self.weights.device)

    @property
    def _query_is_patch(self) -> Bool[Tensor, "image 1 query"]:
        assert self.patch_index is not None
        return (self.patch_index[:, self.query_index] >= 0)[:, None, :].to(self.weights.device)


@dataclass(frozen=True)
class QuerySum:
    """A value that is summed over queries already: a map that would be large for every query, or one that some queries lack.

    Args:
        total: (image, head, ...), the sum over the patch queries.
        count: Over how many of them; None if all.
    """

    total: Float[Tensor, "image head *values"]
    count: Float[Tensor, "image head"] | None = None


@dataclass(frozen=True)
class ReceivedAttention:
    """The attention that each token receives, a mean over all patch queries.

    Args:
        by_patches: (image, head, patch), patches row by row.
        by_prefix: (image, head, prefix), prefix tokens in their order.
        grid: Where the patches lie.
    """

    by_patches: Float[Tensor, "image head patch"]
    by_prefix: Float[Tensor, "image head prefix"]
    grid: TokenGrid


QueryValues = Mapping[str, Float[Tensor, "image head query *values"] | QuerySum]


class PerQuery(Protocol):
    """How values come from the attention of some patch queries."""

    def per_query(self, attention: PatchAttention, *, disposable: bool) -> QueryValues:
        """Named values of each query; `disposable` allows writing to `attention.weights`."""
        ...


class QueryMeans:
    """Means of some values over the patch queries of each image, gathered tile by tile.

    Args:
        grid: Where the patches lie.
        windows: The layers whose attention is not over all the tokens of `grid`.
        values: The values of each query.
    """

    def __init__(self, grid: TokenGrid, windows: Mapping[int, Windows], values: PerQuery) -> None:
        self._grid = grid
        self._windows = windows
        self._values = values
        self._pairs = _PairValues()
        # Over the queries so far, of images or windows that are not complete; and how many queries have the value.
        self._sums: dict[str, Tensor] = {}
        self._pending: dict[str, list[np.ndarray]] = {}  # windows of an image that is not complete

    def add(self, tile: AttentionTile) -> dict[str, Float[np.ndarray, "image head *values"]] | None:
        """The means of the images that the tile completes, in float64; None if it completes none.

        A mean is masked (see `numpy.ma`) where no query of an image has the value.

        Raises:
            InputError: If the tile has other tokens than the grid or the windows.
        """
        windows = self._windows.get(tile.layer)
        if tile.queries.start == tile.heads.start == 0:
            self._sums = {}
            if tile.images.start == 0:
                self._pending = {}  # of a forward pass that was interrupted
        attention = self._whole_image(tile) if windows is None else self._within_windows(tile, windows)
        if attention is not None:
            self._add_queries(tile, attention)
        if tile.queries.stop < tile.num_tokens or tile.heads.stop < tile.num_heads or not self._sums:
            return None
        sums, self._sums = {name: one.cpu().double().numpy() for name, one in self._sums.items()}, {}
        if windows is None:
            return _means(sums, self._grid.num_patches)
        whole = self._join_windows(sums, len(windows.patches))
        means = _means(whole, windows.grid.num_patches)
        return means if len(next(iter(means.values()))) else None

    def _add_queries(self, tile: AttentionTile, attention: PatchAttention) -> None:
        dtype = wide(tile.probabilities.device)
        for name, values in check_values(
            self._values.per_query(attention, disposable=tile.disposable), Tensor | QuerySum
        ).items():
            total = values.total if isinstance(values, QuerySum) else self._sum(name, values, attention)
            if total.shape[:2] != attention.weights.shape[:2]:
                raise InputError(
                    f"the sum over queries {name!r} has shape {tuple(total.shape)}; it must be (image, head, ...), here "
                    f"{tuple(attention.weights.shape[:2])}"
                )
            count = values.count if isinstance(values, QuerySum) else None
            for key, part in ((name, total), (name + _COUNT, count)):
                if part is not None:
                    if key not in self._sums:
                        self._sums[key] = part.new_zeros(len(part), tile.num_heads, *part.shape[2:], dtype=dtype)
                    self._sums[key][:, tile.heads] += part

    def _sum(self, name: str, values: Tensor, attention: PatchAttention) -> Tensor:
        """The sum over patch queries."""
        if values.shape[:3] != attention.weights.shape[:3]:
            raise InputError(
                f"the value {name!r} has shape {tuple(values.shape)}; a measure returns one value per image, head and query, "
                f"here {tuple(attention.weights.shape[:3])}"
            )
        values = values.to(wide(values.device))
        if attention.patch_index is not None:  # queries that only pad a window do not count
            counts = attention._query_is_patch
            values = values * counts.view(*counts.shape, *[1] * (values.ndim - 3))
        return values.sum(dim=2)

    def _whole_image(self, tile: AttentionTile) -> PatchAttention | None:
        self._grid.check_tokens(tile.num_tokens)
        patches = self._grid.patch_tokens
        start, stop = max(tile.queries.start, patches.start), min(tile.queries.stop, patches.stop)
        if stop <= start:
            return None
        weights = tile.probabilities[:, :, start - tile.queries.start : stop - tile.queries.start]

        def pairs(function: OffsetFunction, in_patches: bool) -> Tensor:
            return self._pairs.rows((function, in_patches), self._grid, start - patches.start, stop - patches.start, weights)

        return PatchAttention(weights, self._grid, slice(start, stop), _pairs=pairs)

    def _within_windows(self, tile: AttentionTile, windows: Windows) -> PatchAttention:
        if tile.num_tokens != windows.patches.shape[1]:
            raise InputError(
                f"attention of layer {tile.layer} ({tile.name}) is over {tile.num_tokens} tokens, but its windows have "
                f"{windows.patches.shape[1]}; pass the windows of the images that the model saw"
            )
        # A batch holds the windows of its first image, then those of the second, and so on.
        which = torch.arange(tile.images.start, tile.images.stop) % len(windows.patches)

        def pairs(function: OffsetFunction, in_patches: bool) -> Tensor:
            values = self._pairs.in_windows((function, in_patches), tile.layer, windows)
            return values[which][:, None, tile.queries].to(tile.probabilities)

        return PatchAttention(tile.probabilities, windows.grid, tile.queries, windows.patches[which], _pairs=pairs)

    def _join_windows(self, sums: dict[str, np.ndarray], windows: int) -> dict[str, np.ndarray]:
        """Sums over the windows of whole images; the windows of an incomplete image wait for the rest of it."""
        joined = {}
        for name, of_windows in sums.items():
            pending = np.concatenate([*self._pending.get(name, []), of_windows])
            images = len(pending) // windows
            self._pending[name] = [pending[images * windows :]]
            joined[name] = pending[: images * windows].reshape(images, windows, *pending.shape[1:]).sum(axis=1)
        return joined


_COUNT = " count"  # no name of a value ends in this, since names are identifiers


def _means(sums: Mapping[str, np.ndarray], num_patches: int) -> dict[str, np.ndarray]:
    """Means over the queries that have a value, masked where there are none."""
    means: dict[str, np.ndarray] = {}
    for name, total in sums.items():
        count = sums.get(name + _COUNT)
        if count is not None:
            count = np.ma.masked_equal(count.reshape(*count.shape, *[1] * (total.ndim - count.ndim)), 0)
            means[name] = np.ma.masked_array(total) / count
        elif not name.endswith(_COUNT):
            means[name] = total / num_patches
    return means


class OffsetMeans:
    """The expectation of a function of the offset from query to key under each query's attention to patches.

    Args:
        name: Of the value.
        function: Of the offsets.
        in_patches: Whether it takes offsets in units of patches rather than pixels.
        renormalize: Whether to rescale the weights on patches to sum to 1.
    """

    def __init__(self, name: str, function: OffsetFunction, *, in_patches: bool, renormalize: bool) -> None:
        self._name = name
        self._function = function
        self._in_patches = in_patches
        self._renormalize = renormalize
        self._products = Workspace()

    def per_query(self, attention: PatchAttention, *, disposable: bool) -> QueryValues:
        weights = attention.to_patches
        mass, has_patch_mass = attention.patch_mass, attention.has_patch_mass
        # Fresh memory for a product as large as a tile costs more than the product; a tile that nobody reads any more has some.
        products = weights if disposable else self._products.take(weights.shape, weights.dtype, weights.device)
        expectation = torch.mul(weights, attention._offsets(self._function, self._in_patches), out=products).sum(dim=-1)
        dtype = wide(weights.device)
        expectation, mass = expectation.to(dtype), mass.to(dtype)
        if not self._renormalize:
            return {self._name: expectation, "patch_mass": mass}
        return {
            self._name: attention.sum_where(expectation / mass, has_patch_mass),
            "patch_mass": mass,
            "excluded": (~has_patch_mass).to(dtype),
        }


class ReceivedMeans:
    """Values of the attention that tokens receive in each image, gathered tile by tile.

    Args:
        grid: Where the patches lie.
        function: From the attention received to named values (image, head, ...).
    """

    def __init__(
        self, grid: TokenGrid, function: Callable[[ReceivedAttention], Mapping[str, Float[Tensor, "image head *values"]]]
    ) -> None:
        self._grid = grid
        self._function = function
        self._received: Tensor | None = None

    def add(self, tile: AttentionTile) -> dict[str, Float[np.ndarray, "image head *values"]] | None:
        """The values of the images that the tile completes, in float64; None if it completes none."""
        self._grid.check_tokens(tile.num_tokens)
        patches = self._grid.patch_tokens
        if tile.queries.start == tile.heads.start == 0:
            shape = len(tile.probabilities), tile.num_heads, tile.num_tokens
            self._received = tile.probabilities.new_zeros(shape, dtype=wide(tile.probabilities.device))
        assert self._received is not None
        start, stop = (max(token - tile.queries.start, 0) for token in (patches.start, patches.stop))
        patch_queries = tile.probabilities[:, :, start:stop]
        self._received[:, tile.heads] += patch_queries.sum(dim=2)
        if tile.queries.stop < tile.num_tokens or tile.heads.stop < tile.num_heads:
            return None
        received, self._received = self._received / self._grid.num_patches, None
        attention = ReceivedAttention(received[..., patches], received[..., : patches.start], self._grid)
        values = check_values(self._function(attention))
        for name, one in values.items():
            if one.shape[:2] != received.shape[:2]:
                raise InputError(
                    f"the value {name!r} has shape {tuple(one.shape)}; a measure of received attention returns one value per "
                    f"image and head, here {tuple(received.shape[:2])}"
                )
        return {name: one.cpu().double().numpy() for name, one in values.items()}


_Kernel = tuple[OffsetFunction, bool]  # a function of offsets, and whether it takes them in patches


class _PairValues:
    """Functions of the offset from some patches to all, kept where that takes little memory."""

    def __init__(self) -> None:
        self._tables: dict[tuple[_Kernel, TokenGrid], OffsetTable] = {}
        self._memory: dict[_Kernel, Workspace] = {}
        self._held: dict[_Kernel, tuple[Any, ...]] = {}  # what each memory holds
        self._windows: dict[tuple[_Kernel, int], Tensor] = {}

    def rows(self, kernel: _Kernel, grid: TokenGrid, start: int, stop: int, like: Tensor) -> Float[Tensor, "query patch"]:
        """Values from the patches `start` to `stop`, of the type and on the device of `like`."""
        whole = grid.num_patches**2 <= _KEPT_PAIRS
        first, last = (0, grid.num_patches) if whole else (start, stop)
        values = self._memory.setdefault(kernel, Workspace()).take((last - first, grid.num_patches), like.dtype, like.device)
        held = (grid, first, last, like.dtype, like.device)
        if self._held.get(kernel) != held:
            self._table(kernel, grid).rows(first, last, device=like.device, out=values)
            self._held[kernel] = held
        return values[start - first : stop - first]

    def in_windows(self, kernel: _Kernel, layer: int, windows: Windows) -> Float[Tensor, "window query token"]:
        """Values within all the windows of a layer."""
        if (kernel, layer) not in self._windows:
            self._windows[kernel, layer] = windows.pairs(self._table(kernel, windows.grid))
        return self._windows[kernel, layer]

    def _table(self, kernel: _Kernel, grid: TokenGrid) -> OffsetTable:
        if (kernel, grid) not in self._tables:
            function, in_patches = kernel
            self._tables[kernel, grid] = OffsetTable(grid, function, in_patches=in_patches)
        return self._tables[kernel, grid]


def _right(dx: Tensor, dy: Tensor) -> Tensor:
    return dx


def _down(dx: Tensor, dy: Tensor) -> Tensor:
    return dy


# Columns of the tables of results, which a value would overwrite.
_COLUMNS = ("image", "name", "layer", "module", "head", "std", "confidence", "num_windows", "num_images")
_FIELDS = ("measure", "unit", "label", "values", "uniform", "per_image", "names", "modules", "options", "provenance")
_METHODS = ("main", "plot", "plot_panel", "panel_title", "save", "summary", "key_numbers", "csv_table", "to_dataframe")
_RESERVED = (*_COLUMNS, *_FIELDS, *_METHODS)  # named values are columns of the table and attributes of the result


def check_values(values: Any, kind: Any = Tensor) -> Mapping[str, Any]:
    """Return what the function of a measure returned if it is a dictionary of tensors under names that a table can have.

    Args:
        values: What the function returned.
        kind: Type that each value must have.

    Raises:
        InputError: If it is not.
    """
    if not isinstance(values, Mapping) or not values:
        raise InputError(f"the function of a measure must return a dictionary of named tensors; got {type(values).__name__}")
    for name, value in values.items():
        if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED or name.startswith(("uniform_", "_")):
            raise InputError(
                f"a value is called {name!r}; names must be identifiers that begin neither with 'uniform_' nor with '_', and "
                f"none of {', '.join(_RESERVED)}"
            )
        if not isinstance(value, kind):
            raise InputError(f"the value {name!r} must be a tensor; got {type(value).__name__}")
    return values


@contextmanager
def read_only(tensor: Tensor, name: str) -> Iterator[None]:
    """Raise InputError if `tensor` is written to within the context.

    The memory is the model's own, or is shown to other measures afterwards: whatever is written to it corrupts their numbers.
    """
    version = None if tensor.is_inference() else tensor._version
    yield
    if version is not None and tensor._version != version:
        raise InputError(f"{name} wrote to the tensor that it was given; work on a copy, as out-of-place operations do")


def has_mass(mass: Tensor) -> Tensor:
    """Whether softmax weights with this sum can be rescaled.

    Softmax weights below the smallest normal number round to 0. Where their sum is larger by the resolution of the type, what
    is lost is within rounding.
    """
    resolution = torch.finfo(mass.dtype)
    # Of NaN this is true, so that it is not left out as a small mass would be, but raises an error.
    return ~(mass < resolution.tiny / resolution.eps)


def wide(device: torch.device) -> torch.dtype:
    """The type for sums: float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64
