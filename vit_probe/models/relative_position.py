"""Relative position embeddings: attention terms that depend on the offset between two patches."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vit_probe.errors import InputError
from vit_probe.models.position_embedding import PatchPositions

__all__ = ["RelativePosition", "resize_relative_position"]


class RelativePosition(nn.Module):
    """Relative position logits of one layer: the product of each query with the embedding of its offset from each key.

    They are added to the content-based logits before the softmax. As in the paper, positions are one-dimensional: p is a
    patch's index in raster order, and each of the 2 * rows * cols - 1 offsets p_q - p_k has an embedding, which takes the
    place of the key while the query is that of the content-based attention.

    Where the paper leaves a choice: every layer has its own table, shared by its heads; these logits are scaled by
    1/sqrt(head_dim), like the content-based ones; and pairs with a prefix token, which has no raster index, get 0. A class
    token thus learns about positions from the patches, and with `pooling="token"` the last layer's table has no effect.

    Args:
        grid: Rows and columns of patches.
        head_dim: Width of a head's queries.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, appendix D.4 (relative positional embeddings); Shaw et al. 2018,
        arXiv:1803.02155, section 3.3 (embeddings shared across heads).

    Examples:
        >>> terms = RelativePosition((2, 3), head_dim=8)
        >>> terms.table.shape
        torch.Size([1, 11, 8])
        >>> query = torch.rand(1, 4, 7, 8)  # one prefix token and six patches
        >>> terms(query, PatchPositions((2, 3), torch.arange(6))).shape
        torch.Size([1, 4, 7, 7])
    """

    def __init__(self, grid: tuple[int, int], head_dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.empty(1, 2 * grid[0] * grid[1] - 1, head_dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(
        self, query: Float[Tensor, "batch head token dim"], positions: PatchPositions
    ) -> Float[Tensor, "batch head token token"]:
        """What to add to the scaled content-based logits.

        Args:
            query: Prefix tokens first, then the patches of `positions`.
            positions: Where the patches lie; for a grid other than the table's, the table is interpolated.
        """
        table, index = resize_relative_position(self.table, self.grid, positions.grid), positions.index
        patches = index.shape[-1]
        prefix = query.shape[2] - patches
        last = table.shape[1] // 2
        offset = (index[..., :, None] - index[..., None, :] + last).reshape(-1, 1, patches, patches)
        # Multiplying by the table before looking up offsets avoids a tensor of one embedding per pair of patches.
        terms = query[:, :, prefix:] @ table[0].mT * query.shape[-1] ** -0.5
        return F.pad(terms.take_along_dim(offset, dim=-1), (prefix, 0, prefix, 0))

    @torch.no_grad()
    def resize(self, grid: tuple[int, int]) -> None:
        """Interpolates the table for `grid`, in place."""
        table = resize_relative_position(self.table, self.grid, grid)
        self.table = nn.Parameter(table.clone(), requires_grad=self.table.requires_grad)
        self.grid = grid


def resize_relative_position(
    table: Float[Tensor, "1 offset dim"], old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Tensor, "1 new_offset dim"]:
    """Interpolates a table of raster-order offsets in two dimensions, for another grid of patches.

    A raster-order offset stands for one or two offsets in rows and columns: with 8 columns, 5 is five columns, or one row
    less three columns. The table is therefore read as a map over row and column offsets, which is interpolated linearly
    at the new grid's offsets, measured in patches of the old grid; offsets beyond its border take the border's value.
    Where two of the resulting offsets share a raster-order offset, the entry is their mean, weighted by the number of
    pairs of patches that have each. This is our choice: the paper does not resize such a table.

    Args:
        table: Embeddings of the offsets from -(rows * cols - 1) to rows * cols - 1.
        old_grid: Rows and columns of the table.
        new_grid: Rows and columns of the result.

    Raises:
        InputError: If the table does not have one entry per offset of `old_grid`, or the new grid is empty.

    Examples:
        >>> resize_relative_position(torch.rand(1, 7, 8), (2, 2), (3, 5)).shape
        torch.Size([1, 29, 8])
    """
    rows, cols = old_grid
    if table.ndim != 3 or table.shape[1] != 2 * rows * cols - 1:
        raise InputError(
            f"a table of the offsets in {rows} x {cols} patches has shape (1, {2 * rows * cols - 1}, dim), "
            f"got {tuple(table.shape)}"
        )
    if min(new_grid) < 1:
        raise InputError(f"the new grid must have at least one row and one column, got {new_grid}")
    if tuple(new_grid) == tuple(old_grid):
        return table
    by_row_and_col = table[0, _raster_offsets(old_grid, table.device)]
    by_row_and_col = by_row_and_col.to(torch.promote_types(table.dtype, torch.float32))
    row, col = (_linear_weights(old, new).to(by_row_and_col) for old, new in zip(old_grid, new_grid, strict=True))
    resized = torch.einsum("ir,jc,rcd->ijd", row, col, by_row_and_col).flatten(0, 1)
    offsets = _raster_offsets(new_grid, table.device).flatten()
    rows, cols = new_grid
    pairs = torch.outer(rows - _steps(rows).abs(), cols - _steps(cols).abs()).to(resized).view(-1, 1)
    empty = resized.new_zeros(2 * rows * cols - 1, resized.shape[1])
    mean = empty.index_add(0, offsets, resized * pairs) / empty[:, :1].index_add(0, offsets, pairs)
    return mean[None].to(table.dtype)


def _steps(length: int) -> Int[Tensor, "offset"]:
    """Offsets between `length` patches along one axis."""
    return torch.arange(1 - length, length)


def _raster_offsets(grid: tuple[int, int], device: torch.device) -> Int[Tensor, "row_offset col_offset"]:
    """Index into the table for each row and column offset."""
    rows, cols = grid
    return (_steps(rows)[:, None] * cols + _steps(cols) + rows * cols - 1).to(device)


def _linear_weights(old: int, new: int) -> Float[Tensor, "new_offset old_offset"]:
    """Weights that interpolate linearly along one axis, at the new grid's offsets measured in patches of the old grid."""
    wanted = (_steps(new).double() * old / new).clamp(1 - old, old - 1)
    return (1 - (wanted[:, None] - _steps(old)).abs()).clamp(min=0)
