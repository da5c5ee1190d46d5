"""Finding the tokens of a layer whose norms are of another kind than most."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from vit_probe.measures.mixture import Mixture, one_gaussian, two_gaussians

__all__ = ["find_artifacts"]

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
