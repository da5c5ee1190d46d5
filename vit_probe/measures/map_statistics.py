"""Statistics of maps over patches: how two maps correlate, and how few patches hold most of a map."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from vit_probe.errors import InputError

__all__ = ["head_correlation", "kept_mass_mask", "map_correlation"]

_MASS_TOLERANCE = 1e-9  # relative; so that rounding of the sum does not add a patch
_CONSTANT_TOLERANCE = 1e-6  # relative; attention in float32 resolves no smaller variation


def kept_mass_mask(maps: Float[np.ndarray, "*maps row col"], mass: float = 0.6) -> Bool[np.ndarray, "*maps row col"]:
    """The fewest patches that hold a given fraction of each map: the largest values, until their sum reaches it.

    The fraction is of the map's own sum, so attention on prefix tokens does not count. Of equal values, those in upper rows
    come first, then those further left. A map of zeros keeps no patch.

    Args:
        maps: One non-negative value per patch.
        mass: The fraction, in (0, 1].

    Raises:
        InputError: If the maps hold values that are negative or not finite, or `mass` is out of range.

    References:
        Caron et al. 2021, arXiv:2104.14294, figure 4 and section 4.2.2 (60 % of the mass).

    Examples:
        >>> kept_mass_mask(np.array([[0.4, 0.1], [0.3, 0.2]]), mass=0.6)
        array([[ True, False],
               [ True, False]])
    """
    values = _checked(maps)
    if not 0 < mass <= 1:
        raise InputError(f"mass, the fraction of each map to keep, must lie in (0, 1], got {mass}")
    if (values < 0).any():
        raise InputError("maps hold negative values, which have no mass; pass attention or rollout")
    flat = values.reshape(*values.shape[:-2], -1)
    order = np.argsort(-flat, axis=-1, kind="stable")
    largest_first = np.take_along_axis(flat, order, axis=-1)
    cumulative = np.cumsum(largest_first, axis=-1)
    kept = cumulative - largest_first < mass * cumulative[..., -1:] * (1 - _MASS_TOLERANCE)
    mask = np.zeros(flat.shape, dtype=bool)
    np.put_along_axis(mask, order, kept, axis=-1)
    return mask.reshape(values.shape)


def map_correlation(
    first: Float[np.ndarray, "*#maps row col"], second: Float[np.ndarray, "*#maps row col"]
) -> Float[np.ndarray, "*maps"]:
    """Pearson correlation of two maps over the patches; NaN if either is constant, up to a relative 1e-6.

    Raises:
        InputError: If the two have different grids, or hold values that are not finite.

    Examples:
        >>> first = np.array([[0.4, 0.1], [0.3, 0.2]])
        >>> map_correlation(first, np.stack([2 * first, 1 - first, np.ones((2, 2))])).round(6)
        array([ 1., -1., nan])
    """
    first, second = _checked(first), _checked(second)
    if first.shape[-2:] != second.shape[-2:]:
        raise InputError(f"maps of {first.shape[-2:]} patches cannot be compared with maps of {second.shape[-2:]}")
    return np.asarray((_standardised(first) * _standardised(second)).sum(axis=(-2, -1)))


def head_correlation(maps: Float[np.ndarray, "*images head row col"]) -> Float[np.ndarray, "*images head"]:
    """Mean correlation of each head's map with the maps of the other heads.

    Without constant maps, its mean over heads is the mean over all pairs of heads. Pairs with a constant map have no
    correlation and are left out; the result is NaN for a head without any pair.

    Raises:
        InputError: If the maps have no axis for heads, or hold values that are not finite.

    Examples:
        >>> one = np.array([[0.4, 0.1], [0.3, 0.2]])
        >>> head_correlation(np.stack([one, 2 * one, 1 - one])).round(6)
        array([ 0.,  0., -1.])
    """
    values = _checked(maps)
    if values.ndim < 3:
        raise InputError(f"maps have shape {values.shape}; they must be (head, row, col), or have images before that")
    standardised = _standardised(values).reshape(*values.shape[:-2], -1)
    correlations = standardised @ standardised.swapaxes(-1, -2)
    correlations[..., np.eye(values.shape[-3], dtype=bool)] = np.nan
    defined = np.isfinite(correlations)
    count = defined.sum(axis=-1)
    return np.asarray(np.where(defined, correlations, 0).sum(axis=-1) / np.where(count > 0, count, np.nan))


def _standardised(maps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each map centred and scaled to norm 1; NaN if it is constant."""
    deviations = maps - maps.mean(axis=(-2, -1), keepdims=True)
    norms = np.sqrt((deviations**2).sum(axis=(-2, -1), keepdims=True))
    constant = norms <= _CONSTANT_TOLERANCE * np.sqrt((maps**2).sum(axis=(-2, -1), keepdims=True))
    return np.asarray(deviations / np.where(constant, np.nan, norms))


def _checked(maps: NDArray[Any]) -> NDArray[np.float64]:
    values = np.asarray(maps, dtype=np.float64)
    if values.ndim < 2 or 0 in values.shape[-2:]:
        raise InputError(f"maps have shape {values.shape}; their last two axes must be (row, col), neither empty")
    if not np.isfinite(values).all():
        raise InputError("maps hold values that are not finite; check the model's weights and images")
    return values
