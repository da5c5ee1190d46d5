"""Finding the tokens of a layer whose norms are of another kind than most."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from vit_probe.measures.mixture import Mixture, one_gaussian, two_gaussians

__all__ = ["find_artifacts"]

_CLEAN = 2.0  # Ashman's D of a clean separation
_CHANCE = 3.0  # standard deviations of a difference of counts
_MOST = 0.5  # of the images


def find_artifacts(
    counts: Int[np.ndarray, "bin"], images: Int[np.ndarray, "bin"], edges: Float[np.ndarray, "edge"]
) -> dict[str, float]:
    """What `TokenNormsResult` says of the artifacts of a layer, by its names; see `vit_probe.measures.token_norms.token_norms`.

    Args:
        counts: How many tokens have the logarithm of their norm between two edges.
        images: How many images have that of their largest token there.
        edges: Logarithms; one more than there are bins.
    """
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
        "artifacts": float(counts[first:].sum() / counts.sum()),
        "artifact_images": with_some,
        "typical_norm": float(lower),
        "artifact_norm": float(upper),
    }


def _valley_is_seen(two: Mixture, middles: np.ndarray, counts: np.ndarray) -> bool:
    """Whether the fitted density has a valley, and fewer values lie in it than about either mean, by more than chance.

    A flat distribution, or one that rises to an edge, is fitted by two components with a valley that is not there.
    """
    valley = two.valley()
    if valley is None:
        return False
    for mean, std in zip(two.means, two.stds, strict=True):
        near = min(std, abs(mean - valley)) / 2
        in_valley, on_peak = (counts[np.abs(middles - place) <= near].sum() for place in (valley, mean))
        if on_peak - in_valley <= _CHANCE * np.sqrt(on_peak + in_valley):
            return False
    return True
