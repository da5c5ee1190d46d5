"""Artifacts among tokens whose norms and places are known: how many planted ones are found, and what is not taken for one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from vit_probe import token_norms
from vit_probe.measures.artifacts import find_artifacts

SHAPE = (32, 16, 16)  # image, row, col
BIN = np.log(2) / 128


def found(norms: np.ndarray) -> dict[str, float]:
    """What is found in norms (image, row, col)."""
    bins = np.floor(np.log(norms) / BIN).astype(int)
    first, size = bins.min(), np.ptp(bins) + 1
    pairs = np.append(np.minimum(bins[:, 1:], bins[:, :-1]), np.minimum(bins[:, :, 1:], bins[:, :, :-1]))
    counted = [np.bincount(values.ravel() - first, minlength=size) for values in (bins, bins.max(axis=(1, 2)), pairs)]
    return find_artifacts(*counted, (first + np.arange(size + 1)) * BIN, open_below=False)


def background(spread: float, random: np.random.Generator) -> np.ndarray:
    """Log-normal norms; half of their variance is smooth, as neighbouring patches resemble each other."""
    smooth = gaussian_filter(random.normal(size=SHAPE), (0, 1.5, 1.5), mode="wrap")
    return 30 * np.exp(spread * (smooth / smooth.std() + random.normal(size=SHAPE)) / np.sqrt(2))


def foreground(share: float, random: np.random.Generator) -> np.ndarray:
    """In each image, a smooth area of this share of the tokens."""
    noise = gaussian_filter(random.normal(size=SHAPE), (0, 2, 2), mode="nearest")
    return noise > np.quantile(noise, 1 - share, axis=(1, 2), keepdims=True)


def times_found(spread: float, share: float, ratio: float, samples: int) -> int:
    """In how many samples of randomly placed artifacts their share is found, to a quarter."""
    total = 0
    for seed in range(samples):
        random = np.random.default_rng(seed)
        norms, planted = background(spread, random), random.random(SHAPE) < share
        total += abs(found(np.where(planted, ratio, 1) * norms)["artifacts"] / planted.mean() - 1) < 0.25
    return total


# Power and false alarms, as the docstring of token_norms states them

RATIOS = [1.6, 1.8, 2, 2.5, 3, 4]
SHARES = [0.005, 0.01, 0.02, 0.05]
LOWEST_RATIOS = {0.1: [2, 2, 1.8, 1.6], 0.15: [3, 2.5, 2.5, 2], 0.2: [4, 4, 3, 2.5]}


@pytest.mark.parametrize("spread", LOWEST_RATIOS)
def test_the_docstring_tells_what_is_found(spread: float) -> None:
    ratios = LOWEST_RATIOS[spread]
    assert f"at a spread of {spread}: {', '.join(map(str, ratios))}" in str(token_norms.__doc__)
    for share, ratio in zip(SHARES, ratios, strict=True):
        assert times_found(spread, share, ratio, samples=10) >= 9
        if (index := RATIOS.index(ratio)) >= 2:
            assert times_found(spread, share, RATIOS[index - 2], samples=10) <= 1


@pytest.mark.parametrize("ratio", [1.8, 3])
@pytest.mark.parametrize("share", [0.03, 0.1, 0.35])
def test_a_foreground_is_no_artifact(share: float, ratio: float) -> None:
    for seed, spread in enumerate([0.05, 0.1, 0.15, 0.2]):
        random = np.random.default_rng(seed)
        norms = background(spread, random)
        assert found(np.where(foreground(share, random), ratio, 1) * norms)["artifacts"] == 0


@pytest.mark.parametrize(
    "distribution",
    [
        lambda random: np.exp(0.15 * random.normal(size=SHAPE)),
        lambda random: np.exp(0.4 * random.normal(size=SHAPE)),
        lambda random: np.exp(0.1 * random.standard_t(3, SHAPE)),
        lambda random: np.exp(0.3 * random.exponential(size=SHAPE)),
        lambda random: np.exp(random.gamma(3, 0.25, SHAPE)),
        lambda random: random.gamma(1, 10, SHAPE) + 0.01,
        lambda random: np.exp(random.uniform(1, 3, SHAPE)),
        lambda random: random.uniform(5, 50, SHAPE),
        lambda random: background(0.3, random),
    ],
    ids=["normal", "broad", "heavy tails", "exponential", "skewed", "skewed below", "flat", "uniform", "smooth"],
)
def test_one_group_of_norms_has_no_artifacts(distribution: Any) -> None:
    for seed in range(10):
        assert found(distribution(np.random.default_rng(seed)))["artifacts"] == 0


# Places


def places(kind: str) -> np.ndarray:
    """Tokens at different places of an image, by kind of pattern."""
    mask = np.zeros(SHAPE[1:], dtype=bool)
    if kind == "single tokens":
        mask[2::5, 2::5] = True
    elif kind == "pairs":
        mask[2::5, 2::5] = mask[2::5, 3::5] = True
        mask[12, 13] = False  # one without a neighbour: fewer than one on average
    elif kind == "line":
        mask[7] = True
    elif kind == "square":
        mask[4:7, 4:7] = True
    elif kind == "diagonal":
        np.fill_diagonal(mask, True)
    return mask


@pytest.mark.parametrize(
    ("kind", "neighbours"), [("single tokens", 0), ("pairs", 16 / 17), ("diagonal", 0), ("line", None), ("square", None)]
)
def test_places_decide_where_norms_are_the_same(kind: str, neighbours: float | None) -> None:
    norms = np.where(places(kind), 5, 1) * background(0.1, np.random.default_rng(0))
    result = found(norms)
    assert result["artifacts"] == (0 if neighbours is None else places(kind).mean())
    if neighbours is None:
        assert np.isnan(result["artifact_neighbours"])
    else:
        assert result["artifact_neighbours"] == pytest.approx(neighbours)


def test_artifacts_confined_to_a_third_of_the_image_are_found() -> None:
    random = np.random.default_rng(0)
    planted = foreground(1 / 3, random) & (random.random(SHAPE) < 0.15)
    result = found(np.where(planted, 4, 1) * background(0.12, random))
    assert result["artifacts"] == planted.mean()
    assert 0.2 < result["artifact_neighbours"] < 0.8


def test_artifacts_above_a_foreground_are_found_alone() -> None:
    random = np.random.default_rng(0)
    planted = random.random(SHAPE) < 0.02
    norms = background(0.1, random) * np.where(foreground(0.35, random), 1.8, 1)
    result = found(np.where(planted, 200 * np.exp(0.1 * random.normal(size=SHAPE)), norms))
    assert result["artifacts"] == planted.mean()
    assert 80 < result["threshold"] < 170


# The valley


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=3, max_size=40))
def test_the_depth_of_the_valley_is_that_of_nested_loops(counts: list[int]) -> None:
    counts = [*counts, 1]
    size, width, deepest = len(counts), 1, 0.0  # bins of 1/8 octave: the narrowest window is one bin wide
    while 3 * width <= size:
        windows = [sum(counts[start : start + width]) for start in range(size - width + 1)]
        for start, inside in enumerate(windows):
            peak = min(max(windows[: start + 1]), max(windows[start:]))
            deepest = max(deepest, (peak - inside) / max(peak + inside, 1) ** 0.5)
        width = int(np.ceil(1.5 * width))
    top = np.eye(size, dtype=int)[-1]
    result = find_artifacts(np.array(counts), top, 0 * top, np.arange(size + 1) * np.log(2) / 8, open_below=False)
    assert result["valley_depth"] == pytest.approx(deepest)
    assert np.isnan(result["threshold"]) == (deepest <= 3.5)


def test_the_threshold_is_in_the_middle_of_an_empty_valley() -> None:
    counts = np.array([500, 900, 300, 0, 0, 0, 0, 0, 40, 30, 0, 0, 0, 0, 0, 50, 20])
    result = find_artifacts(counts, np.eye(17, dtype=int)[16], 0 * counts, np.arange(18.0), open_below=False)
    assert result["threshold"] in (np.exp(5), np.exp(6))  # below both kinds, though the upper valley is as deep
    assert result["artifacts"] == 140 / 1840
    assert result["typical_norm"] == pytest.approx(np.exp((500 * 0.5 + 900 * 1.5 + 300 * 2.5) / 1700))
    assert result["artifact_norm"] == pytest.approx(np.exp((40 * 8.5 + 30 * 9.5 + 50 * 15.5 + 20 * 16.5) / 140))


def test_the_lowest_valley_counts_though_another_is_deeper() -> None:
    counts = np.array([500, 900, 300, 1, 1, 1, 1, 1, 40, 30, 0, 0, 0, 0, 0, 50, 20])
    result = find_artifacts(counts, np.eye(17, dtype=int)[16], 0 * counts, np.arange(18.0), open_below=False)
    assert np.exp(3) <= result["threshold"] <= np.exp(8)
    assert 140 <= result["artifacts"] * counts.sum() <= 145


@pytest.mark.parametrize(("count", "is_found"), [(12, False), (13, True)])
def test_it_takes_thirteen_artifacts(count: int, is_found: bool) -> None:
    counts = np.array([500, 900, 300, 0, 0, 0, count])
    result = find_artifacts(counts, np.eye(7, dtype=int)[6], 0 * counts, np.arange(8.0), open_below=False)
    assert (result["artifacts"] > 0) is is_found
