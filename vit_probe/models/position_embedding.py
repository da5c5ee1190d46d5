"""Position embeddings added to the tokens: learned 1-D, learned 2-D, fixed sine-cosine; and resizing a learned table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vit_probe.errors import InputError
from vit_probe.models.config import Resampling

__all__ = ["LearnedPosition2d", "PatchPositions", "resize_position_embedding", "sincos_position_embedding"]

_INTERPOLATION = {
    "bicubic-antialias": dict(antialias=True, align_corners=False),
    "bicubic": dict(antialias=False, align_corners=False),
    "bicubic-align-corners": dict(antialias=False, align_corners=True),
}


@dataclass(frozen=True)
class PatchPositions:
    """Where the patch tokens of a forward pass lie, for relative and rotary positions in the attention.

    Args:
        grid: Rows and columns of patches in the images.
        index: Raster index of each patch token, row * columns + column: (patch,) for all images of the batch alike, or
            (batch, patch).

    Examples:
        >>> PatchPositions((2, 3), torch.arange(6)).grid
        (2, 3)
    """

    grid: tuple[int, int]
    index: Int[Tensor, "*batch patch"]


def resize_position_embedding(
    table: Float[Tensor, "1 token dim"],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    *,
    num_prefix_tokens: int = 1,
    resampling: Resampling = "bicubic-antialias",
) -> Float[Tensor, "1 new_token dim"]:
    """Interpolates a learned 1-D table in two dimensions, for another grid of patches.

    The entries of prefix tokens are copied. The grids may be rectangular.

    Args:
        table: Entries of prefix tokens first, then one per patch in raster order.
        old_grid: Rows and columns of the table.
        new_grid: Rows and columns of the result.
        num_prefix_tokens: Number of entries that belong to prefix tokens.
        resampling: `bicubic-antialias` (timm), `bicubic` (transformers) or `bicubic-align-corners` (torchvision).
            The ViT paper says only "2D interpolation"; its code interpolates linearly.

    Raises:
        InputError: If the table does not have one entry per prefix token and patch of `old_grid`, the new grid is empty,
            or `resampling` is unknown.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.2.

    Examples:
        >>> table = torch.rand(1, 1 + 14 * 14, 24)
        >>> resize_position_embedding(table, (14, 14), (24, 16)).shape
        torch.Size([1, 385, 24])
    """
    rows, cols = old_grid
    if table.ndim != 3 or table.shape[1] != num_prefix_tokens + rows * cols:
        raise InputError(
            f"a position table for {num_prefix_tokens} prefix tokens and {rows} x {cols} patches has shape "
            f"(1, {num_prefix_tokens + rows * cols}, dim), got {tuple(table.shape)}"
        )
    if resampling not in _INTERPOLATION:
        raise InputError(f"resampling must be one of {', '.join(_INTERPOLATION)}; got {resampling!r}")
    if min(new_grid) < 1:
        raise InputError(f"the new grid must have at least one row and one column, got {new_grid}")
    if tuple(new_grid) == tuple(old_grid):
        return table
    prefix, patches = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    image = rearrange(patches, "1 (row col) dim -> 1 dim row col", row=rows).float()
    # Antialiasing in torch 2.13 is wrong on the CPU if the result is one column wide, so such a table is transposed.
    transpose = new_grid[1] == 1
    size = (1, new_grid[0]) if transpose else tuple(new_grid)
    image = F.interpolate(image.mT if transpose else image, size=size, mode="bicubic", **_INTERPOLATION[resampling])
    image = image.mT if transpose else image
    return torch.cat([prefix, rearrange(image, "1 dim row col -> 1 (row col) dim").to(table.dtype)], dim=1)


def sincos_position_embedding(grid: tuple[int, int], dim: int, *, num_prefix_tokens: int = 0) -> Float[Tensor, "1 token dim"]:
    """The fixed 2-D sine-cosine table, in MAE's order of channels.

    The first half of the channels encodes a patch's column, the second its row, each as sines followed by cosines of the
    index times 10000^(-i / (dim / 4)). The entries of prefix tokens are 0. Some implementations put the row first or space
    the frequencies differently; a table loaded from a checkpoint is kept as it is.

    Args:
        grid: Rows and columns of patches.
        dim: Width of the tokens.
        num_prefix_tokens: Number of entries that belong to prefix tokens.

    Raises:
        InputError: If `dim` is not divisible by 4.

    References:
        He et al. 2022 (MAE), arXiv:2111.06377, appendix A.1; Vaswani et al. 2017, arXiv:1706.03762, section 3.5.

    Examples:
        >>> sincos_position_embedding((2, 3), 8, num_prefix_tokens=1).shape
        torch.Size([1, 7, 8])
    """
    if dim % 4:
        raise InputError(f"a 2-D sine-cosine table needs a width divisible by 4, got {dim}")
    rows, cols = grid
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, col = torch.meshgrid(torch.arange(rows).double(), torch.arange(cols).double(), indexing="ij")
    angles = [coordinate.reshape(-1, 1) * frequency for coordinate in (col, row)]
    patches = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([patches.new_zeros(num_prefix_tokens, dim), patches])[None].float()


class LearnedPosition2d(nn.Module):
    """A table for columns and one for rows, each of half the width; a patch's embedding is the two concatenated.

    Args:
        grid: Rows and columns of patches.
        dim: Width of the tokens.
        num_prefix_tokens: Number of prefix tokens, each of which has an embedding of full width.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, appendix D.4 (2-dimensional positional embedding).

    Examples:
        >>> position = LearnedPosition2d((2, 3), 8, num_prefix_tokens=1)
        >>> position((2, 3)).shape, position((4, 4)).shape
        (torch.Size([1, 7, 8]), torch.Size([1, 17, 8]))
    """

    def __init__(self, grid: tuple[int, int], dim: int, *, num_prefix_tokens: int) -> None:
        super().__init__()
        self.col = nn.Parameter(torch.empty(1, grid[1], dim // 2))
        self.row = nn.Parameter(torch.empty(1, grid[0], dim - dim // 2))
        self.prefix = nn.Parameter(torch.empty(1, num_prefix_tokens, dim))
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches that the tables hold."""
        return self.row.shape[1], self.col.shape[1]

    def forward(self, grid: tuple[int, int]) -> Float[Tensor, "1 token dim"]:
        """The table for `grid`, prefix tokens first; rows and columns are interpolated linearly if their number differs."""
        row, col = _resize_1d(self.row, grid[0]), _resize_1d(self.col, grid[1])
        col = col[:, None].expand(-1, grid[0], -1, -1)
        row = row[:, :, None].expand(-1, -1, grid[1], -1)
        return torch.cat([self.prefix, rearrange(torch.cat([col, row], dim=-1), "1 row col dim -> 1 (row col) dim")], dim=1)

    @torch.no_grad()
    def resize(self, grid: tuple[int, int]) -> None:
        """Interpolates both tables for `grid`, in place."""
        self.row = nn.Parameter(_resize_1d(self.row, grid[0]))
        self.col = nn.Parameter(_resize_1d(self.col, grid[1]))


def _resize_1d(table: Tensor, length: int) -> Tensor:
    if table.shape[1] == length:
        return table
    return rearrange(
        F.interpolate(rearrange(table, "1 n dim -> 1 dim n"), size=length, mode="linear", align_corners=False),
        "1 dim n -> 1 n dim",
    )
