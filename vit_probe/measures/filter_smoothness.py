"""How smooth first-layer filters are: the part of their variance over space that lies in low spatial frequencies."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn

from vit_probe.errors import InputError
from vit_probe.results import check_finite

__all__ = ["low_frequency_share"]

_ROUNDING = 1e-24  # of the constant's square: what the transform of a constant filter leaves elsewhere


def low_frequency_share(filters: NDArray[Any]) -> float:
    """The part of the filters' variance over space that lies in the lowest quarter of spatial frequencies.

    Frequencies are those of the cosine transform (DCT-II) of each filter and channel. The lowest quarter are the lower half of
    them along either axis, rounded up. The constant is no variance and left out. For filters of independent random weights all
    frequencies are alike, and the share is that of their number: 15 of 63 for 8 x 8 pixels, about 0.24.

    Args:
        filters: (filter, channel, row, col); their variances are added up, so that a filter counts by its scale.

    Returns:
        The share, from 0 to 1.

    Raises:
        InputError: If the shape is another, a value is not finite, or no filter varies over space.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5, where the components of figure 7 (left) resemble plausible basis
        functions of a patch's fine structure; this number is ours.
    """
    values = np.asarray(filters, dtype=np.float64)
    if values.ndim != 4 or 0 in values.shape:
        raise InputError(f"filters have shape {values.shape}; they must be (filter, channel, row, col), none empty")
    check_finite(values, "filters")
    rows, cols = values.shape[2:]
    spectrum = (dctn(values, axes=(2, 3), norm="ortho") ** 2).sum(axis=(0, 1))
    constant, spectrum[0, 0] = spectrum[0, 0], 0.0
    if spectrum.sum() <= _ROUNDING * constant:
        raise InputError(f"the filters, of {rows} x {cols} pixels, are constant over space, which is neither smooth nor rough")
    return float(spectrum[: -(-rows // 2), : -(-cols // 2)].sum() / spectrum.sum())
