"""How well the similarity of positions tells how near two patches lie: one number for a whole map."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from vit_probe.errors import InputError

__all__ = ["patches_apart", "position_nearness"]


def patches_apart(rows: int, cols: int) -> Float[np.ndarray, "patch patch"]:
    """How far the centres of any two patches of a grid lie apart, counted in patches; patches row by row."""
    places = np.indices((rows, cols)).reshape(2, -1).T
    return np.asarray(np.linalg.norm(places[:, None] - places[None], axis=-1))


def position_nearness(similarity: Float[np.ndarray, "row col row col"]) -> float:
    """Correlation (Pearson) of the similarity of two patches' positions with how far they lie apart.

    Over all pairs of different patches, distances between their centres counted in patches. Below 0 where near patches are
    more alike than distant ones, 0 where positions tell nothing of nearness, -1 only where similarity falls along a straight
    line. The ViT paper shows maps and gives no number; this one is a definition of this package.

    Args:
        similarity: As `position_similarity` gives it.

    Raises:
        InputError: If the shape is another, or no two pairs differ in similarity or in distance.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5, figure 7 (centre) and figure 10, for the maps.
    """
    values = np.asarray(similarity, dtype=np.float64)
    if values.ndim != 4 or values.shape[:2] != values.shape[2:]:
        raise InputError(f"similarity has shape {values.shape}; it must be (row, col, row, col), the same grid twice")
    rows, cols = values.shape[:2]
    pairs = ~np.eye(rows * cols, dtype=bool)
    apart = patches_apart(rows, cols)[pairs]
    alike = values.reshape(rows * cols, -1)[pairs]
    if not (len(apart) and np.ptp(apart) > 0 and np.ptp(alike) > 0):
        raise InputError(
            f"all pairs of the {rows} x {cols} patches are equally far apart or equally alike; "
            "a correlation needs pairs that differ in both"
        )
    return float(np.corrcoef(apart, alike)[0, 1])
