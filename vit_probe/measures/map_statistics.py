"""Numbers that tell maps over an image's patches apart: how much they agree, and how few patches hold most of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from vit_probe.errors import InputError

__all__ = ["head_correlation", "kept_mass_mask", "map_correlation"]

_ROUNDING = 1e-9
_EVEN = 1e-6  # of its size: attention in float32 tells no finer


def kept_mass_mask(maps: Float[np.ndarray, "*maps row col"], mass: float = 0.6) -> Bool[np.ndarray, "*maps row col"]:
    """The min_batch_size patches that hold a part of each map: the largest values, until their sum reaches it.

    The part is of the map's own sum, so that attention on prefix tokens does not count. Of equal values those come first that
    are further up, then further left. A map of zeros keeps no patch.

    Args:
        maps: One value a patch, none negative.
        mass: The part, in (0, 1].

    Raises:
        InputError: If the maps hold a negative value or one that is not finite, or the part is outside its range.

    References:
        Caron et al. 2021, arXiv:2104.14294, figure 4 and section 4.2.2 (60 % of the mass).
    """
    values = _checked(maps)
    if not 0 < mass <= 1:
        raise InputError(f"the part of a map's mass must lie in (0, 1], got {mass}")
    if (values < 0).any():
        raise InputError("maps hold negative values, which have no mass; pass attention or rollout")
    flat = values.reshape(*values.shape[:-2], -1)
    order = np.argsort(-flat, axis=-1, kind="stable")
    largest_first = np.take_along_axis(flat, order, axis=-1)
    until = np.cumsum(largest_first, axis=-1)
    kept = until - largest_first < mass * until[..., -1:] * (1 - _ROUNDING)
    mask = np.zeros(flat.shape, dtype=bool)
    np.put_along_axis(mask, order, kept, axis=-1)
    return mask.reshape(values.shape)


def map_correlation(
    one: Float[np.ndarray, "*#maps row col"], other: Float[np.ndarray, "*#maps row col"]
) -> Float[np.ndarray, "*maps"]:
    """Pearson's correlation of two maps over the patches; NaN where one is constant, to a millionth.

    Raises:
        InputError: If the maps are of other grids, or hold a value that is not finite.
    """
    first, second = _checked(one), _checked(other)
    if first.shape[-2:] != second.shape[-2:]:
        raise InputError(f"maps of {first.shape[-2:]} patches cannot be compared with maps of {second.shape[-2:]}")
    return np.asarray((_standardised(first) * _standardised(second)).sum(axis=(-2, -1)))


def head_correlation(maps: Float[np.ndarray, "*images head row col"]) -> Float[np.ndarray, "*images head"]:
    """Mean of the correlations of each head's map with those of the other heads.

    Its mean over the heads is the mean over all pairs of heads. Pairs with a map that is constant have no correlation and are
    left out: NaN for such a head, and where no other is left.

    Raises:
        InputError: If the maps have no axis for heads, or hold a value that is not finite.
    """
    values = _checked(maps)
    if values.ndim < 3:
        raise InputError(f"maps have shape {values.shape}; they must be (head, row, col), or have images before that")
    standard = _standardised(values).reshape(*values.shape[:-2], -1)
    pairs = standard @ standard.swapaxes(-1, -2)
    pairs[..., np.eye(values.shape[-3], dtype=bool)] = np.nan
    there = np.isfinite(pairs)
    count = there.sum(axis=-1)
    return np.asarray(np.where(there, pairs, 0).sum(axis=-1) / np.where(count > 0, count, np.nan))


def _standardised(maps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each map less its mean, of length 1; NaN if it is constant."""
    deviations = maps - maps.mean(axis=(-2, -1), keepdims=True)
    length = np.sqrt((deviations**2).sum(axis=(-2, -1), keepdims=True))
    constant = length <= _EVEN * np.sqrt((maps**2).sum(axis=(-2, -1), keepdims=True))
    return np.asarray(deviations / np.where(constant, np.nan, length))


def _checked(maps: NDArray[Any]) -> NDArray[np.float64]:
    values = np.asarray(maps, dtype=np.float64)
    if values.ndim < 2 or 0 in values.shape[-2:]:
        raise InputError(f"maps have shape {values.shape}; their last two axes must be (row, col), neither empty")
    if not np.isfinite(values).all():
        raise InputError("maps hold values that are not finite; check the model's weights and images")
    return values
