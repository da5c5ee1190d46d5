"""Rotary position embedding in two dimensions (axial RoPE)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vit_probe.models.position_embedding import PatchPositions

__all__ = ["rotate_by_position"]

_BASE = 100.0


def rotate_by_position(
    x: Float[Tensor, "batch head token dim"], positions: PatchPositions
) -> Float[Tensor, "batch head token dim"]:
    """Rotates the queries or keys of the patches by angles proportional to their row and column.

    The product of a rotated query and a rotated key then depends on the position of the patches only through their
    offset. Channels 2i and 2i + 1 form a plane. In the first half of a head's channels the angle is the patch's column
    times 100^(-i / (dim / 4)), in the second half its row times the same, with i counted from 0 in each half. The base of
    100 is Heo et al.'s, for coordinates in the tens; Su et al. use 10000, for thousands of words.

    Prefix tokens are not rotated. Rows and columns are counted in patches at every image size, so that a model has
    nothing to resize.

    Args:
        x: Queries or keys, prefix tokens first, then the patches of `positions`; `dim` is divisible by 4.
        positions: Where the patches lie.

    References:
        Su et al. 2021, arXiv:2104.09864, section 3.2; Heo et al. 2024, arXiv:2403.13298, section 3 (axial frequency).

    Examples:
        >>> query = torch.rand(1, 4, 7, 8)  # one prefix token and six patches
        >>> rotated = rotate_by_position(query, PatchPositions((2, 3), torch.arange(6)))
        >>> torch.equal(rotated[:, :, :2], query[:, :, :2])  # the prefix token, and the patch at row 0, column 0
        True
        >>> torch.allclose(rotated.norm(dim=-1), query.norm(dim=-1))
        True
    """
    index, cols, quarter = positions.index, positions.grid[1], x.shape[-1] // 4
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = _BASE ** -(torch.arange(quarter, dtype=dtype, device=x.device) / quarter)
    col, row = index % cols, index // cols
    angle = torch.cat([coordinate[..., None] * frequency for coordinate in (col, row)], dim=-1).unsqueeze(-3)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    prefix, patches = x.tensor_split([x.shape[2] - index.shape[-1]], dim=2)
    first, second = patches.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
    return torch.cat([prefix, rotated], dim=2)
