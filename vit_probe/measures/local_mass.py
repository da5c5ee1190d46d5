"""Local mass: what share of a head's attention stays near the query."""

from __future__ import annotations

import torch
from torch import Tensor

from vit_probe.errors import InputError
from vit_probe.measures.base.offset_measure import offset_measure

__all__ = ["local_mass"]


@offset_measure(unit="share", reference="arXiv:2212.03862", offsets="patches")
def local_mass(dx: Tensor, dy: Tensor, *, radius: float = 1.5) -> Tensor:
    """Share of attention within a radius of some patches of each query patch, for every layer and head.

    For layer l and head h: the mean over images and query patches i of sum_j a_ij [||x_i - x_j|| <= radius], x in units of
    patches. The query itself counts; a radius of 1.5 is the 3 x 3 patches around it. It tells heads that attend to neighbours
    from heads that attend far away even where their mean distances agree.

    Args:
        radius: In patches. The papers look at the nearest patches (Walmer et al.) or at a mean distance, and fix none.

    Returns:
        A `HeadResult`: `local_mass` with its spread over images, `patch_mass` (the share of attention on patches), and
        `uniform_local_mass`, the share of uniform attention.

    Raises:
        InputError: If an option is unknown, the radius is negative, the images cannot be used, the grid does not fit the
            attention, or no attention is seen.

    References:
        Walmer et al. 2023, Teaching Matters, arXiv:2212.03862, section 4 (local attention heads); Raghu et al. 2021,
        arXiv:2108.08810, section 4 (local and global heads).

    Examples:
        >>> from vit_probe import load_model, local_mass
        >>> local_mass(load_model("demo"), torch.zeros(1, 3, 64, 64), radius=1.5).local_mass.shape
        (9, 6)
    """
    if not radius >= 0:
        raise InputError(f"radius must be 0 or more patches, got {radius}")
    return (torch.hypot(dx, dy) <= radius).double()
