"""Artifact tokens of a layer: scattered tokens whose norms lie beyond a valley of the distribution of norms."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int

__all__ = ["find_artifacts"]

_MIN_DEPTH = 3.5  # of the valley, in standard deviations of the difference of two counts
_MIN_WIDTH = math.log(2) / 8  # of the valley, in logarithms of the norm: finer dips are chance
_WIDTH_STEP = 1.5  # from one width of windows to the next
_MAX_NEIGHBOURS = 1.0  # tokens beyond the valley above, below, left and right of one, on average
_MIN_IMAGES = 0.25  # fraction of the images


def find_artifacts(
    counts: Int[np.ndarray, "bin"],
    image_maxima: Int[np.ndarray, "bin"],
    pair_minima: Int[np.ndarray, "bin"],
    edges: Float[np.ndarray, "edge"],
    *,
    open_below: bool,
) -> dict[str, float]:
    """Find the artifacts of one layer; see `vit_probe.measures.token_norms.token_norms` for the conditions.

    Args:
        counts: Number of tokens in each bin, by the logarithm of their norm.
        image_maxima: Number of images in each bin, by the largest norm in the image.
        pair_minima: Number of pairs of tokens side by side or one above the other in each bin, by the smaller norm of the two.
        edges: Edges of the bins in ascending order, natural logarithms of norms.
        open_below: Whether the first bin also holds all smaller norms, such as 0. It is then left out of the means.

    Returns:
        The fields of `TokenNormsResult` that describe artifacts, by name.

    Examples:
        >>> edges = np.arange(9) / 2
        >>> counts = np.array([200, 900, 200, 0, 0, 0, 100, 0])
        >>> image_maxima, pair_minima = np.array([0, 0, 0, 0, 0, 0, 20, 0]), np.array([800, 1300, 90, 0, 0, 0, 10, 0])
        >>> artifacts = find_artifacts(counts, image_maxima, pair_minima, edges, open_below=False)
        >>> round(artifacts["artifacts"], 3), artifacts["artifact_images"], artifacts["artifact_neighbours"]
        (0.071, 1.0, 0.2)
    """
    above = _num_above(counts)
    neighbours = 2 * _num_above(pair_minima) / np.maximum(above, 1)
    artifact_images = _num_above(image_maxima) / image_maxima.sum()
    depths = _valley_depths(counts, min_width=max(round(_MIN_WIDTH / (edges[1] - edges[0])), 1))
    depths[(neighbours >= _MAX_NEIGHBOURS) | (artifact_images <= _MIN_IMAGES)] = 0
    centres, closed = (edges[:-1] + edges[1:]) / 2, counts.copy()
    if open_below and counts[1:].any():
        closed[0] = 0
    result = {
        "threshold": np.nan,
        "artifacts": 0.0,
        "artifact_images": 0.0,
        "typical_norm": _geometric_mean(centres, closed),
        "artifact_norm": np.nan,
        "valley_depth": float(depths.max()),
        "artifact_neighbours": np.nan,
    }
    if depths.max() <= _MIN_DEPTH:
        return result
    first = _lowest_valley(depths)
    return result | {
        "threshold": float(np.exp(edges[first])),
        "artifacts": float(above[first] / above[0]),
        "artifact_images": float(artifact_images[first]),
        "typical_norm": _geometric_mean(centres[:first], closed[:first]),
        "artifact_norm": _geometric_mean(centres[first:], counts[first:]),
        "artifact_neighbours": float(neighbours[first]),
    }


def _valley_depths(counts: Int[np.ndarray, "bin"], *, min_width: int) -> Float[np.ndarray, "edge"]:
    """How much fewer values there are around each edge than in the densest window of the same width on either side.

    The difference is in units of its standard deviation for independent (Poisson) counts; it is the largest over widths from
    `min_width` bins to a third of all bins.
    """
    depths = np.zeros(len(counts) + 1)
    cumulative = np.concatenate([[0], np.cumsum(counts)])
    width = min_width
    while 3 * width <= len(counts):
        inside = cumulative[width:] - cumulative[:-width]
        # The lower of both peaks; where there is none on one side, it is the window itself, and the depth 0.
        peak = np.minimum(np.maximum.accumulate(inside), np.maximum.accumulate(inside[::-1])[::-1])
        depth = (peak - inside) / np.sqrt(np.maximum(peak + inside, 1))
        middles = slice(width // 2, width // 2 + len(inside))
        depths[middles] = np.maximum(depths[middles], depth)
        width = math.ceil(width * _WIDTH_STEP)
    return depths


def _lowest_valley(depths: Float[np.ndarray, "edge"]) -> int:
    """The deepest edge of the lowest valley: between artifacts of different kinds there may be others. Of equally deep edges in
    a row, the middle one.
    """
    start = int((depths > _MIN_DEPTH).argmax())
    valley = depths[start:]
    valley = valley[: int(np.append(valley <= _MIN_DEPTH, True).argmax())]
    deepest = int(valley.argmax())
    equal = int(np.append(valley[deepest:] != valley[deepest], True).argmax())
    return start + deepest + equal // 2


def _num_above(counts: Int[np.ndarray, "bin"]) -> Int[np.ndarray, "edge"]:
    """Number of values above each edge."""
    return np.append(counts[::-1].cumsum()[::-1], 0)


def _geometric_mean(logarithms: Float[np.ndarray, "bin"], counts: Int[np.ndarray, "bin"]) -> float:
    return float(np.exp(counts @ logarithms / counts.sum()))
