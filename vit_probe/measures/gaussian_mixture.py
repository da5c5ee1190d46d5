"""Mixtures of one or two Gaussians, fitted to values that are counted in bins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import brentq

__all__ = [
    "Mixture",
    "find_artifacts",
    "one_gaussian",
    "two_gaussians",
]


_SHARES = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)  # of the lower component, to start from
_MOST_STEPS = 2000
_ENOUGH = 1e-9  # gain in log-likelihood of a value, from which on a further step is not worth it
_PLACES = 4001  # between the two means, at which the density is looked at
_TINY = 1e-300


@dataclass(frozen=True)
class Mixture:
    """One or two Gaussians in one dimension, in the order of their means.

    Args:
        weights: (component), summing to 1.
        means: (component).
        stds: (component), standard deviations.
        log_likelihood: Of all values together.
        count: How many values there were.
    """

    weights: Float[np.ndarray, "component"]
    means: Float[np.ndarray, "component"]
    stds: Float[np.ndarray, "component"]
    log_likelihood: float
    count: int

    def density(self, values: Float[np.ndarray, "*values"]) -> Float[np.ndarray, "*values"]:
        """Probability density at these values."""
        parts = zip(self.weights, self.means, self.stds, strict=True)
        return np.sum([weight * np.exp(_log_density(values, mean, std)) for weight, mean, std in parts], axis=0)

    def bic(self) -> float:
        """Bayesian information criterion (Schwarz 1978), which counts the values as independent; the lower the better."""
        return (3 * len(self.weights) - 1) * math.log(self.count) - 2 * self.log_likelihood

    def separation(self) -> float:
        """Ashman's D of two components: the distance of their means over their root mean square standard deviation.

        References:
            Ashman, Bird & Zepf 1994, arXiv:astro-ph/9408030, equation 4: a clean separation needs D > 2.
        """
        return float((self.means[1] - self.means[0]) / math.sqrt((self.stds**2).mean()))

    def valley(self) -> float | None:
        """Where the density of two components is lowest between its two peaks; None if it has one peak.

        The peaks lie between the two means.

        References:
            Ray & Lindsay 2005, The topography of multivariate normal mixtures, Annals of Statistics 33.
        """
        places = np.linspace(self.means[0], self.means[1], _PLACES)
        density = self.density(places)
        before, after = np.maximum.accumulate(density), np.maximum.accumulate(density[::-1])[::-1]
        depth = density / np.maximum(np.minimum(before, after), _TINY)
        deepest = int(depth.argmin())
        return float(places[deepest]) if depth[deepest] < 1 - 1e-9 else None

    def crossing(self) -> float | None:
        """Where, between the two means, either component is as probable as the other; None if one is the more probable at both
        means.
        """

        def lead(value: float) -> float:
            """Of the first component over the second, as a logarithm."""
            logs = np.log(self.weights) + _log_density(value, self.means, self.stds)
            return float(logs[0] - logs[1])

        lower, upper = map(float, self.means)
        if not lead(lower) > 0 > lead(upper):
            return None
        return float(brentq(lead, lower, upper))


def one_gaussian(values: Float[np.ndarray, "bin"], counts: Int[np.ndarray, "bin"], *, narrowest: float) -> Mixture:
    """The Gaussian of the greatest likelihood.

    Args:
        values: The middle of each bin.
        counts: How many values lie in it; some at least.
        narrowest: The least standard deviation, as wide as a bin: finer ones cannot be told.
    """
    total = int(counts.sum())
    mean = counts @ values / total
    std = max(math.sqrt(counts @ (values - mean) ** 2 / total), narrowest)
    likelihood = float(counts @ _log_density(values, mean, std))
    return Mixture(np.ones(1), np.array([mean]), np.array([std]), likelihood, total)


def two_gaussians(values: Float[np.ndarray, "bin"], counts: Int[np.ndarray, "bin"], *, narrowest: float) -> Mixture | None:
    """The two Gaussians of the greatest likelihood that expectation maximisation finds; None if all values are in one bin.

    It starts from twelve splits of the values in two, at fixed shares, and so finds the same each time; scikit-learn's
    GaussianMixture has no weights for values.

    Args:
        values: The middle of each bin, in ascending order.
        counts: How many values lie in it; some at least.
        narrowest: The least standard deviation.

    References:
        Dempster, Laird & Rubin 1977, Maximum likelihood from incomplete data via the EM algorithm.
    """
    values, counts = values[counts > 0], counts[counts > 0]
    if len(values) < 2:
        return None
    share = counts / counts.sum()
    below = np.cumsum(share)[:-1]
    splits = np.unique([np.abs(below - part).argmin() for part in _SHARES])
    upper = (np.arange(len(values)) > splits[:, None]).astype(np.float64)  # (start, bin), part that is the second's
    before = np.full(len(splits), -np.inf)
    for _ in range(_MOST_STEPS):
        parts = np.stack([1 - upper, upper], axis=1) * share
        weights = np.maximum(parts.sum(axis=-1), _TINY)
        means = parts @ values / weights
        spread = (parts * (values - means[..., None]) ** 2).sum(axis=-1) / weights
        stds = np.sqrt(np.maximum(spread, narrowest**2))
        densities = np.log(weights)[..., None] + _log_density(values, means[..., None], stds[..., None])
        together = np.logaddexp(densities[:, 0], densities[:, 1])
        upper = np.exp(densities[:, 1] - together)
        likelihood = together @ share
        if (likelihood - before).max() < _ENOUGH:
            break
        before = likelihood
    best = int(likelihood.argmax())
    order = means[best].argsort(kind="stable")
    total = int(counts.sum())
    return Mixture(weights[best][order], means[best][order], stds[best][order], float(likelihood[best] * total), total)


def _log_density(values: Any, mean: Any, std: Any) -> Any:
    """Of a Gaussian."""
    return -0.5 * ((values - mean) / std) ** 2 - np.log(std) - 0.5 * math.log(2 * math.pi)


_CLEAN = 2.0  # Ashman's D of a clean separation
_CHANCE = 3.5  # standard deviations of a difference of counts
_MOST = 0.5  # of the images


def find_artifacts(
    counts: Int[np.ndarray, "bin"], images: Int[np.ndarray, "bin"], edges: Float[np.ndarray, "edge"], *, open_below: bool
) -> dict[str, float]:
    """What `TokenNormsResult` says of the artifacts of a layer, by its names; see `vit_probe.measures.token_norms.token_norms`.

    Args:
        counts: How many tokens have the logarithm of their norm between two edges.
        images: How many images have that of their largest token there.
        edges: Logarithms; one more than there are bins.
        open_below: Whether the first bin also holds what lies below it, norms of 0 for one. It then takes part in no fit.
    """
    total = counts.sum()
    if open_below and counts[1:].any():
        counts = np.concatenate([[0], counts[1:]])
    middles, narrowest = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
    one = one_gaussian(middles, counts, narrowest=narrowest)
    two = two_gaussians(middles, counts, narrowest=narrowest)
    found = {
        "threshold": np.nan,
        "artifacts": 0.0,
        "artifact_images": 0.0,
        "typical_norm": float(np.exp(one.means[0])),
        "artifact_norm": np.nan,
        "separation": np.nan,
        "bic_gain": np.nan,
    }
    if two is None:
        return found
    found |= {"separation": two.separation(), "bic_gain": one.bic() - two.bic()}
    crossing = two.crossing()
    clean = found["bic_gain"] > 0 and found["separation"] > _CLEAN and two.weights[1] < two.weights[0]
    if crossing is None or not clean or not _valley_is_seen(two, middles, counts):
        return found
    first = int(np.abs(edges - crossing).argmin())  # bin of the least artifact
    lower, upper = np.exp(two.means)
    with_some = float(images[first:].sum() / images.sum())
    if with_some <= _MOST:
        return found
    return found | {
        "threshold": float(np.exp(edges[first])),
        "artifacts": float(counts[first:].sum() / total),
        "artifact_images": with_some,
        "typical_norm": float(lower),
        "artifact_norm": float(upper),
    }


def _valley_is_seen(two: Mixture, middles: np.ndarray, counts: np.ndarray) -> bool:
    """Whether the fitted density has a valley, and fewer values lie in it than where they are densest on either side, by more
    than chance.

    A flat distribution, or one that rises to an edge, is fitted by two components with a valley that is not there. The values
    may be densest away from a component's mean, which lies between two groups where there are two.
    """
    valley = two.valley()
    if valley is None:
        return False
    lowest = int(np.abs(middles - valley).argmin())
    for mean, std, side in zip(two.means, two.stds, (slice(lowest), slice(lowest + 1, None)), strict=True):
        near = int(min(std, abs(mean - valley)) / 2 / (middles[1] - middles[0]))
        around = np.convolve(counts, np.ones(2 * near + 1), mode="full")[near : len(counts) + near]
        in_valley, on_peak = around[lowest], around[side].max()
        if on_peak - in_valley <= _CHANCE * np.sqrt(on_peak + in_valley):
            return False
    return True
