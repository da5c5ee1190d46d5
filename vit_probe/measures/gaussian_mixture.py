"""Mixtures of one or two Gaussians fitted to binned values, and the artifact tokens that a mixture of two reveals."""

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

# Fractions of the values that belong to the lower component at the start of expectation maximisation.
_INITIAL_FRACTIONS = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
_MAX_STEPS = 2000
_MIN_GAIN = 1e-9  # of the mean log-likelihood; a step that gains less is the last
_NUM_DENSITY_POINTS = 4001  # between the two means
_TINY = 1e-300  # keeps divisors and logarithms above 0

# What two components must show to be a layer's artifacts.
_MIN_SEPARATION = 2.0  # Ashman's D
_MIN_VALLEY_DEPTH = 3.5  # standard deviations of the difference of two counts
_MIN_IMAGES = 0.5  # fraction of images with an artifact


@dataclass(frozen=True)
class Mixture:
    """One or two Gaussians in one dimension, in the order of their means.

    Args:
        weights: (component), summing to 1.
        means: (component).
        stds: (component), standard deviations.
        log_likelihood: Of all values together.
        count: Number of values.

    Examples:
        >>> weights, means, stds = np.array([0.9, 0.1]), np.array([0.0, 4.0]), np.ones(2)
        >>> mixture = Mixture(weights, means, stds, log_likelihood=-1700.0, count=1000)
        >>> mixture.separation(), round(mixture.crossing(), 2), round(mixture.valley(), 1)
        (4.0, 2.55, 2.7)
    """

    weights: Float[np.ndarray, "component"]
    means: Float[np.ndarray, "component"]
    stds: Float[np.ndarray, "component"]
    log_likelihood: float
    count: int

    def density(self, values: Float[np.ndarray, "*values"]) -> Float[np.ndarray, "*values"]:
        """Probability density at these values."""
        components = zip(self.weights, self.means, self.stds, strict=True)
        return np.sum([weight * np.exp(_log_density(values, mean, std)) for weight, mean, std in components], axis=0)

    def bic(self) -> float:
        """Bayesian information criterion (Schwarz 1978), which treats the values as independent; lower is better."""
        num_parameters = 3 * len(self.weights) - 1  # means, standard deviations, and weights, which sum to 1
        return num_parameters * math.log(self.count) - 2 * self.log_likelihood

    def separation(self) -> float:
        """Ashman's D of two components: the distance between their means over their root mean square standard deviation.

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
        points = np.linspace(self.means[0], self.means[1], _NUM_DENSITY_POINTS)
        density = self.density(points)
        # Relative to the lower of the highest densities to the left and to the right: below 1 only between two peaks.
        peak_left, peak_right = np.maximum.accumulate(density), np.maximum.accumulate(density[::-1])[::-1]
        relative = density / np.maximum(np.minimum(peak_left, peak_right), _TINY)
        lowest = int(relative.argmin())
        return float(points[lowest]) if relative[lowest] < 1 - 1e-9 else None

    def crossing(self) -> float | None:
        """The point between the two means at which both components are equally probable; None if one component is more probable
        at both means.
        """

        def log_ratio(value: float) -> float:
            """Logarithm of the first component's weighted density over the second's."""
            logs = np.log(self.weights) + _log_density(value, self.means, self.stds)
            return float(logs[0] - logs[1])

        lower, upper = map(float, self.means)
        if not log_ratio(lower) > 0 > log_ratio(upper):
            return None
        return float(brentq(log_ratio, lower, upper))


def one_gaussian(values: Float[np.ndarray, "bin"], counts: Int[np.ndarray, "bin"], *, min_std: float) -> Mixture:
    """Fit one Gaussian by maximum likelihood.

    Args:
        values: Centre of each bin.
        counts: Number of values in each bin; at least one is not 0.
        min_std: Smallest standard deviation: the width of a bin, below which spreads cannot be resolved.

    Examples:
        >>> mixture = one_gaussian(np.array([0.0, 1.0, 2.0]), np.array([1, 2, 1]), min_std=0.1)
        >>> mixture.means, mixture.stds.round(2)
        (array([1.]), array([0.71]))
    """
    total = int(counts.sum())
    mean = counts @ values / total
    std = max(math.sqrt(counts @ (values - mean) ** 2 / total), min_std)
    likelihood = float(counts @ _log_density(values, mean, std))
    return Mixture(np.ones(1), np.array([mean]), np.array([std]), likelihood, total)


def two_gaussians(values: Float[np.ndarray, "bin"], counts: Int[np.ndarray, "bin"], *, min_std: float) -> Mixture | None:
    """Fit two Gaussians by expectation maximisation; None if all values are in one bin.

    It starts from twelve fixed splits of the values into two groups and keeps the best fit, so the result is deterministic.
    (scikit-learn's GaussianMixture does not accept weights for values.)

    Args:
        values: Centre of each bin, in ascending order.
        counts: Number of values in each bin; at least one is not 0.
        min_std: Smallest standard deviation.

    References:
        Dempster, Laird & Rubin 1977, Maximum likelihood from incomplete data via the EM algorithm.

    Examples:
        >>> mixture = two_gaussians(np.arange(8.0), np.array([1, 2, 1, 0, 0, 1, 2, 1]), min_std=0.1)
        >>> mixture.means.round(2), mixture.weights.round(2)
        (array([1., 6.]), array([0.5, 0.5]))
    """
    values, counts = values[counts > 0], counts[counts > 0]
    if len(values) < 2:
        return None
    frequencies = counts / counts.sum()
    cumulative = np.cumsum(frequencies)[:-1]
    splits = np.unique([np.abs(cumulative - fraction).argmin() for fraction in _INITIAL_FRACTIONS])
    # (start, bin), the probability that a value of the bin belongs to the upper component; all starts advance together.
    upper = (np.arange(len(values)) > splits[:, None]).astype(np.float64)
    previous = np.full(len(splits), -np.inf)
    for _ in range(_MAX_STEPS):
        responsibilities = np.stack([1 - upper, upper], axis=1) * frequencies  # (start, component, bin)
        weights = np.maximum(responsibilities.sum(axis=-1), _TINY)
        means = responsibilities @ values / weights
        variances = (responsibilities * (values - means[..., None]) ** 2).sum(axis=-1) / weights
        stds = np.sqrt(np.maximum(variances, min_std**2))
        log_densities = np.log(weights)[..., None] + _log_density(values, means[..., None], stds[..., None])
        log_sum = np.logaddexp(log_densities[:, 0], log_densities[:, 1])
        upper = np.exp(log_densities[:, 1] - log_sum)
        likelihood = log_sum @ frequencies
        if (likelihood - previous).max() < _MIN_GAIN:
            break
        previous = likelihood
    best = int(likelihood.argmax())
    order = means[best].argsort(kind="stable")
    total = int(counts.sum())
    return Mixture(weights[best][order], means[best][order], stds[best][order], float(likelihood[best] * total), total)


def find_artifacts(
    counts: Int[np.ndarray, "bin"], images: Int[np.ndarray, "bin"], edges: Float[np.ndarray, "edge"], *, open_below: bool
) -> dict[str, float]:
    """Find the artifacts of one layer; see `vit_probe.measures.token_norms.token_norms` for the conditions.

    Args:
        counts: Number of tokens in each bin, by the logarithm of their norm.
        images: Number of images in each bin, by the logarithm of their largest norm.
        edges: Edges of the bins in ascending order, natural logarithms of norms.
        open_below: Whether the first bin also holds all smaller norms, such as 0. It is then left out of the fit.

    Returns:
        The fields of `TokenNormsResult` that describe artifacts, by name.

    Examples:
        >>> edges = np.arange(9) / 2
        >>> counts, images = np.array([200, 900, 200, 0, 0, 0, 100, 0]), np.array([0, 0, 0, 0, 0, 0, 20, 0])
        >>> artifacts = find_artifacts(counts, images, edges, open_below=False)
        >>> round(artifacts["artifacts"], 3), artifacts["artifact_images"]
        (0.071, 1.0)
    """
    total = counts.sum()
    if open_below and counts[1:].any():
        counts = np.concatenate([[0], counts[1:]])
    centres, bin_width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
    one = one_gaussian(centres, counts, min_std=bin_width)
    two = two_gaussians(centres, counts, min_std=bin_width)
    result = {
        "threshold": np.nan,
        "artifacts": 0.0,
        "artifact_images": 0.0,
        "typical_norm": float(np.exp(one.means[0])),
        "artifact_norm": np.nan,
        "separation": np.nan,
        "bic_gain": np.nan,
    }
    if two is None:
        return result
    result |= {"separation": two.separation(), "bic_gain": one.bic() - two.bic()}
    crossing = two.crossing()
    clean = result["bic_gain"] > 0 and result["separation"] > _MIN_SEPARATION and two.weights[1] < two.weights[0]
    if crossing is None or not clean or not _has_valley(two, centres, counts):
        return result
    first = int(np.abs(edges - crossing).argmin())  # the first bin of artifacts
    artifact_images = float(images[first:].sum() / images.sum())
    if artifact_images <= _MIN_IMAGES:
        return result
    lower, upper = np.exp(two.means)
    return result | {
        "threshold": float(np.exp(edges[first])),
        "artifacts": float(counts[first:].sum() / total),
        "artifact_images": artifact_images,
        "typical_norm": float(lower),
        "artifact_norm": float(upper),
    }


def _has_valley(two: Mixture, centres: np.ndarray, counts: np.ndarray) -> bool:
    """Whether the fitted density has a valley in which there are significantly fewer values than at the densest place on either
    side.

    The counts are checked too, since two components fitted to a flat distribution, or to one that rises to an edge, have a
    valley that the values do not. The densest place is searched on the whole side, since a component that covers two groups of
    values has its mean between them.
    """
    valley = two.valley()
    if valley is None:
        return False
    lowest = int(np.abs(centres - valley).argmin())
    for mean, std, side in zip(two.means, two.stds, (slice(lowest), slice(lowest + 1, None)), strict=True):
        half_width = int(min(std, abs(mean - valley)) / 2 / (centres[1] - centres[0]))
        window_counts = np.convolve(counts, np.ones(2 * half_width + 1), mode="full")[half_width : len(counts) + half_width]
        in_valley, on_peak = window_counts[lowest], window_counts[side].max()
        if on_peak - in_valley <= _MIN_VALLEY_DEPTH * np.sqrt(on_peak + in_valley):  # Poisson counts
            return False
    return True


def _log_density(values: Any, mean: Any, std: Any) -> Any:
    """Logarithm of the density of a Gaussian."""
    return -0.5 * ((values - mean) / std) ** 2 - np.log(std) - 0.5 * math.log(2 * math.pi)
