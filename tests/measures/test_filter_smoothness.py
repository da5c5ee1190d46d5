"""The share of low spatial frequencies against a cosine transform in loops, and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from vit_probe import InputError, load_model, patch_filters
from vit_probe.measures.patch_filters import low_frequency_share


def _cosine(rows: int, cols: int, down: int, across: int) -> NDArray[np.float64]:
    """The cosine transform's wave of so many half periods."""
    y, x = np.cos(np.pi * down * (np.arange(rows) + 0.5) / rows), np.cos(np.pi * across * (np.arange(cols) + 0.5) / cols)
    return np.outer(y, x)


def literal(filters: NDArray[np.float64]) -> float:
    """Every filter projected on every wave, in loops."""
    *_, rows, cols = filters.shape
    low = total = 0.0
    for down in range(rows):
        for across in range(cols):
            if down == across == 0:
                continue
            wave = _cosine(rows, cols, down, across)
            wave /= np.linalg.norm(wave)
            energy = sum(float((picture * wave).sum()) ** 2 for channels in filters for picture in channels)
            total += energy
            if down < math.ceil(rows / 2) and across < math.ceil(cols / 2):
                low += energy
    return low / total


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (4, 3, 11, 11), (3, 1, 4, 7), (2, 3, 1, 6)])
def test_waves_one_at_a_time(shape: tuple[int, ...]) -> None:
    filters = np.random.default_rng(0).normal(size=shape)
    assert low_frequency_share(filters) == pytest.approx(literal(filters), rel=1e-12)


def test_single_waves() -> None:
    share = [low_frequency_share(_cosine(8, 8, *wave)[None, None]) for wave in ((1, 0), (3, 3), (4, 0), (2, 5), (7, 7))]
    assert share == pytest.approx([1, 1, 0, 0, 0], abs=1e-12)
    both = _cosine(8, 8, 1, 2) + 2 * _cosine(8, 8, 6, 5)
    assert low_frequency_share(both[None, None]) == pytest.approx(1 / 5)


def test_the_mean_counts_for_nothing_and_scale_for_something() -> None:
    filters = np.random.default_rng(1).normal(size=(4, 3, 8, 8))
    assert low_frequency_share(filters + 100) == pytest.approx(low_frequency_share(filters))
    assert low_frequency_share(-3 * filters) == pytest.approx(low_frequency_share(filters))
    smooth, rough = _cosine(8, 8, 1, 1), _cosine(8, 8, 7, 7)
    assert low_frequency_share(np.stack([3 * smooth, rough])[:, None]) == pytest.approx(9 / 10)


def test_independent_weights_have_all_frequencies_alike() -> None:
    filters = np.random.default_rng(2).normal(size=(2000, 3, 8, 8))
    assert low_frequency_share(filters) == pytest.approx(15 / 63, abs=0.005)


def test_the_bundled_model_s_is_its_card_s() -> None:
    filters = patch_filters(load_model("demo")).filters
    assert low_frequency_share(filters) == pytest.approx(literal(filters), rel=1e-12)
    assert low_frequency_share(filters) == pytest.approx(0.71, abs=0.005)


@pytest.mark.parametrize("shape", [(3, 8, 8), (0, 3, 8, 8)])
def test_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"filters have shape \(.*\); they must be \(filter, channel, row, col\), none empty"):
        low_frequency_share(np.zeros(shape))


def test_values_that_are_not_finite() -> None:
    with pytest.raises(InputError, match="filters are not all finite"):
        low_frequency_share(np.full((1, 1, 2, 2), np.nan))


@pytest.mark.parametrize(
    "filters", [np.full((2, 3, 4, 5), 1e9 / 3), np.zeros((1, 1, 4, 5)), np.arange(12.0).reshape(4, 3, 1, 1)]
)
def test_filters_without_variance(filters: NDArray[np.float64]) -> None:
    with pytest.raises(InputError, match=r"the filters, of \d x \d pixels, are constant over space"):
        low_frequency_share(filters)
