"""Correlation of maps, and the patches that hold most of one, against literal versions and NumPy's own."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_probe import InputError
from vit_probe.measures.map_statistics import head_correlation, kept_mass_mask, map_correlation


def maps(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) ** 3


def literal_mask(one: np.ndarray, mass: float) -> np.ndarray:
    """Patch after patch, the largest that is left."""
    kept = np.zeros(one.shape, dtype=bool)
    while one[kept].sum() < mass * one.sum() * (1 - 1e-9):
        left = np.where(kept, -1, one)
        kept[np.unravel_index(left.argmax(), one.shape)] = True
    return kept


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 5), cols=st.integers(1, 5), mass=st.floats(0.01, 1), seed=st.integers(0, 999))
def test_the_largest_until_the_mass_is_reached(rows: int, cols: int, mass: float, seed: int) -> None:
    values = maps(2, 3, rows, cols, seed=seed)
    mask = kept_mass_mask(values, mass)
    assert (mask.shape, mask.dtype) == (values.shape, bool)
    for index in np.ndindex(2, 3):
        np.testing.assert_array_equal(mask[index], literal_mask(values[index], mass))
        kept = values[index][mask[index]]
        assert kept.sum() >= mass * values[index].sum() * (1 - 1e-6)
        assert kept.sum() - kept.min() < mass * values[index].sum()  # none of them too many


def test_as_dino_thresholds_its_attention() -> None:
    """visualize_attention.py of the paper's authors, in words: sorted upwards, what lies above 40 % of the cumulative sum."""
    one = maps(6, 7)
    order = np.argsort(one.ravel())
    cumulative = np.cumsum(one.ravel()[order] / one.sum())
    expected = np.zeros(42, dtype=bool)
    expected[order] = cumulative > 1 - 0.6
    np.testing.assert_array_equal(kept_mass_mask(one), expected.reshape(6, 7))


@pytest.mark.parametrize(("mass", "patches"), [(0.05, 1), (0.1, 1), (0.3, 3), (0.6, 6), (0.61, 7), (1.0, 10)])
def test_of_equal_values_the_first_are_kept(mass: float, patches: int) -> None:
    mask = kept_mass_mask(np.full((2, 5), 0.1, dtype=np.float32), mass)
    np.testing.assert_array_equal(mask.ravel(), np.arange(10) < patches)


def test_where_all_lies_on_one_patch_and_where_nothing_lies() -> None:
    one = np.zeros((2, 3, 3))
    one[0, 1, 2] = 0.2
    mask = kept_mass_mask(one, 1.0)
    assert np.argwhere(mask).tolist() == [[0, 1, 2]]


def test_the_scale_of_a_map_changes_nothing() -> None:
    np.testing.assert_array_equal(kept_mass_mask(maps(4, 4)), kept_mass_mask(1e-6 * maps(4, 4)))


def test_correlation_is_numpys() -> None:
    first, second = maps(3, 4, 5), maps(3, 4, 5, seed=1)
    expected = [np.corrcoef(one.ravel(), other.ravel())[0, 1] for one, other in zip(first, second, strict=True)]
    np.testing.assert_allclose(map_correlation(first, second), expected, rtol=1e-12)
    np.testing.assert_allclose(map_correlation(first[0], second), map_correlation(first[[0, 0, 0]], second), rtol=1e-12)


@given(scale=st.floats(0.01, 100), shift=st.floats(-10, 10), seed=st.integers(0, 99))
def test_correlation_of_closed_forms(scale: float, shift: float, seed: int) -> None:
    one = maps(3, 4, seed=seed)
    assert map_correlation(one, scale * one + shift) == pytest.approx(1)
    assert map_correlation(one, shift - scale * one) == pytest.approx(-1)


def test_a_constant_map_correlates_with_none() -> None:
    constant = np.full((3, 4), 0.1, dtype=np.float32)
    assert np.isnan(map_correlation(constant, maps(3, 4)))
    assert np.isnan(map_correlation(constant, constant))
    logits = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32) * 1e-9
    even = np.exp(logits) / np.exp(logits).sum()  # of a softmax in float32
    rounded = even * (1 + np.float32(1.2e-7) * np.sign(logits))
    assert np.isnan(map_correlation(rounded, maps(3, 4)))


def test_a_head_with_a_constant_map_is_left_out() -> None:
    values = maps(2, 3, 3, 5)
    expected = head_correlation(values[:, 1:])
    values[0, 0] = 0.1
    found = head_correlation(values)
    assert np.isnan(found).tolist() == [[True, False, False], [False, False, False]]
    np.testing.assert_allclose(found[0, 1:], expected[0])
    assert np.isnan(head_correlation(np.full((2, 3, 3), 0.1))).all()


def test_heads_are_compared_in_pairs() -> None:
    values = maps(2, 4, 3, 5)
    found = head_correlation(values)
    assert found.shape == (2, 4)
    for image in range(2):
        table = np.corrcoef(values[image].reshape(4, -1))
        np.testing.assert_allclose(found[image], (table.sum(axis=1) - 1) / 3, rtol=1e-10)
        pairs = [table[one, other] for one, other in combinations(range(4), 2)]
        assert found[image].mean() == pytest.approx(np.mean(pairs))


def test_equal_heads_opposite_heads_and_one_head() -> None:
    one = maps(3, 3)
    np.testing.assert_allclose(head_correlation(np.stack([one, 2 * one])), 1)
    np.testing.assert_allclose(head_correlation(np.stack([one, 1 - one])), -1)
    assert np.isnan(head_correlation(one[None])).tolist() == [True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kept_mass_mask(maps(4)), r"maps have shape \(4,\); their last two axes must be \(row, col\), neither empty"),
        (lambda: kept_mass_mask(np.full((2, 2), np.nan)), "maps hold values that are not finite"),
        (lambda: kept_mass_mask(-maps(2, 2)), "maps hold negative values, which have no mass; pass attention or rollout"),
        (lambda: kept_mass_mask(maps(2, 2), 0), r"mass, the fraction of each map to keep, must lie in \(0, 1\], got 0"),
        (lambda: kept_mass_mask(maps(2, 2), 60), r"must lie in \(0, 1\], got 60"),
        (lambda: map_correlation(maps(2, 3), maps(3, 2)), r"maps of \(2, 3\) patches cannot be compared with maps of \(3, 2\)"),
        (lambda: head_correlation(maps(2, 3)), r"maps have shape \(2, 3\); they must be \(head, row, col\), or have images"),
        (lambda: head_correlation(np.zeros((2, 0, 3))), r"maps have shape \(2, 0, 3\); their last two axes"),
    ],
)
def test_errors_say_what_arrived(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
