"""Mixtures of counted values: scikit-learn's on the values themselves, and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.mixture import GaussianMixture

from vit_probe.measures.gaussian_mixture import Mixture, one_gaussian, two_gaussians

WIDTH = 0.004


def counted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Middles of bins, and how many values lie in each."""
    places = np.floor(values / WIDTH).astype(int)
    counts = np.bincount(places - places.min())
    return (places.min() + np.arange(len(counts)) + 0.5) * WIDTH, counts


def drawn(*parts: tuple[int, float, float], seed: int = 0) -> np.ndarray:
    """So many values about a mean with a standard deviation, for each part."""
    random = np.random.default_rng(seed)
    return np.concatenate([random.normal(mean, std, count) for count, mean, std in parts])


def fitted(values: np.ndarray) -> Mixture:
    found = two_gaussians(*counted(values), min_std=WIDTH)
    assert found is not None
    return found


def mixture(weight: float, distance: float, stds: tuple[float, float] = (1.0, 1.0)) -> Mixture:
    """A second component of this weight, and the distance of its mean from the first's."""
    return Mixture(np.array([1 - weight, weight]), np.array([0.0, distance]), np.array(stds), 0.0, 1)


PARTS = {
    "few and far": ((4900, 1.0, 0.2), (100, 3.0, 0.1)),
    "few and broad": ((4700, 1.0, 0.2), (300, 2.5, 0.4)),
    "halves": ((2500, 0.0, 0.3), (2500, 1.5, 0.3)),
    "the lower are few": ((200, -1.0, 0.1), (4800, 1.0, 0.2)),
}


@pytest.mark.parametrize("name", PARTS)
def test_scikit_learn_finds_the_same_in_the_values(name: str) -> None:
    values = drawn(*PARTS[name])
    theirs = GaussianMixture(2, tol=1e-9, max_iter=5000, n_init=5, reg_covar=1e-9, random_state=0).fit(values[:, None])
    order = theirs.means_[:, 0].argsort()
    mine = fitted(values)
    np.testing.assert_allclose(mine.weights, theirs.weights_[order], atol=1e-3)
    np.testing.assert_allclose(mine.means, theirs.means_[order, 0], atol=2e-3)
    np.testing.assert_allclose(mine.stds, np.sqrt(theirs.covariances_[order, 0, 0]), atol=2e-3)
    assert mine.log_likelihood == pytest.approx(theirs.score(values[:, None]) * len(values), abs=0.5)
    one = GaussianMixture(1).fit(values[:, None])
    gain = one_gaussian(*counted(values), min_std=WIDTH).bic() - mine.bic()
    assert gain == pytest.approx(one.bic(values[:, None]) - theirs.bic(values[:, None]), rel=0.01)
    crossing = mine.crossing()
    assert crossing is not None
    theirs_there = theirs.predict_proba(np.array([[crossing - 0.02], [crossing + 0.02]]))[:, order[1]]
    assert theirs_there[0] < 0.5 < theirs_there[1]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), part=st.floats(0.01, 0.5), shift=st.integers(-500, 500))
def test_a_shift_shifts_the_means_alone(seed: int, part: float, shift: int) -> None:
    values = drawn((2000, 0.0, 0.2), (max(int(2000 * part), 20), 2.0, 0.2), seed=seed)
    middles, counts = counted(values)
    one, other = (two_gaussians(where, counts, min_std=WIDTH) for where in (middles, middles + shift * WIDTH))
    assert one is not None
    assert other is not None
    np.testing.assert_allclose(other.means - shift * WIDTH, one.means, atol=1e-5)
    np.testing.assert_allclose(other.stds, one.stds, atol=1e-5)
    np.testing.assert_allclose(other.weights, one.weights, atol=1e-5)


def test_one_gaussian_has_the_moments_and_their_likelihood() -> None:
    values = drawn((3000, 2.0, 0.5))
    middles, counts = counted(values)
    repeated = np.repeat(middles, counts)
    one = one_gaussian(middles, counts, min_std=WIDTH)
    assert one.means[0] == pytest.approx(repeated.mean())
    assert one.stds[0] == pytest.approx(repeated.std())
    assert one.log_likelihood == pytest.approx(stats.norm.logpdf(repeated, repeated.mean(), repeated.std()).sum())
    assert one.bic() == pytest.approx(2 * math.log(3000) - 2 * one.log_likelihood)


def test_values_in_one_or_two_bins() -> None:
    middles = np.array([0.5, 1.5, 2.5])
    assert two_gaussians(middles, np.array([0, 7, 0]), min_std=1.0) is None
    assert one_gaussian(middles, np.array([0, 7, 0]), min_std=1.0).stds[0] == 1.0
    two = two_gaussians(middles, np.array([3, 0, 1]), min_std=0.1)
    assert two is not None
    np.testing.assert_allclose(two.means, [0.5, 2.5])
    np.testing.assert_allclose(two.weights, [0.75, 0.25])
    np.testing.assert_allclose(two.stds, 0.1)  # as narrow as may be


def test_empty_bins_change_nothing() -> None:
    middles, counts = counted(drawn(*PARTS["few and far"]))
    padded = np.pad(counts, (5, 9))
    wider = middles[0] + WIDTH * np.arange(-5, len(counts) + 9)
    one, other = two_gaussians(middles, counts, min_std=WIDTH), two_gaussians(wider, padded, min_std=WIDTH)
    assert one is not None
    assert other is not None
    np.testing.assert_allclose(other.means, one.means, rtol=1e-9)


def test_the_density_is_that_of_scipy() -> None:
    found, places = mixture(0.3, 2.0, (0.5, 2.0)), np.linspace(-3, 6, 50)
    np.testing.assert_allclose(
        found.density(places), 0.7 * stats.norm.pdf(places, 0, 0.5) + 0.3 * stats.norm.pdf(places, 2, 2.0)
    )
    assert found.separation() == pytest.approx(2 / math.sqrt((0.25 + 4) / 2))


@pytest.mark.parametrize(
    ("found", "two_peaks"),
    [
        (mixture(0.5, 1.99), False),  # equal components have two peaks where their means are more than 2 std apart
        (mixture(0.5, 2.05), True),
        (mixture(0.02, 2.5), False),  # a shoulder
        (mixture(0.02, 4.5), True),
        (mixture(0.01, 30.0, (1.0, 0.01)), True),  # a needle
        (mixture(0.3, 1.0, (0.5, 3.0)), False),
        (mixture(0.5, 0.0), False),
        (mixture(0.5, 60.0), True),  # nothing at all in between
    ],
)
def test_two_peaks(found: Mixture, two_peaks: bool) -> None:
    valley = found.valley()
    assert (valley is not None) is two_peaks
    if valley is not None:
        assert 0 < valley < found.means[1]
        near = found.means[1] / 100
        assert found.density(np.array(valley)) < min(found.density(valley + near * np.array([-1, 1])))


def test_where_the_components_cross() -> None:
    assert mixture(0.5, 4.0).crossing() == pytest.approx(2.0)
    assert mixture(0.1, 4.0).crossing() == pytest.approx(2 + math.log(9) / 4)  # equal stds: a line in the exponent
    found = mixture(0.2, 5.0, (0.5, 2.0))
    crossing = found.crossing()
    assert crossing is not None
    assert 0.8 * stats.norm.pdf(crossing, 0, 0.5) == pytest.approx(0.2 * stats.norm.pdf(crossing, 5, 2))
    assert mixture(0.01, 0.5).crossing() is None  # the first is the more probable at both means
