from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_probe import InputError, load_model, position_similarity
from vit_probe.measures.position_similarity import position_nearness


def _literal(similarity: np.ndarray) -> float:
    """Pair by pair, with the standard library."""
    rows, cols = similarity.shape[:2]
    places = [(row, col) for row in range(rows) for col in range(cols)]
    pairs = [(one, other) for one in places for other in places if one != other]
    return statistics.correlation(
        [math.dist(*pair) for pair in pairs], [float(similarity[one + other]) for one, other in pairs]
    )


def _falling(rows: int, cols: int) -> np.ndarray:
    """Similarity 1 less a tenth of the distance."""
    places = np.indices((rows, cols)).reshape(2, -1).T
    return (1 - 0.1 * np.linalg.norm(places[:, None] - places[None], axis=-1)).reshape(rows, cols, rows, cols)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 4), cols=st.integers(3, 5), seed=st.integers(0, 99))
def test_it_is_what_it_says(rows: int, cols: int, seed: int) -> None:
    similarity = np.random.default_rng(seed).uniform(-1, 1, (rows, cols, rows, cols))
    assert position_nearness(similarity) == pytest.approx(_literal(similarity), abs=1e-12)


def test_closed_forms() -> None:
    assert position_nearness(_falling(3, 5)) == pytest.approx(-1)
    assert position_nearness(-_falling(3, 5)) == pytest.approx(1)
    wrong_of_itself = _falling(3, 5)
    np.einsum("rcrc->rc", wrong_of_itself)[:] = -9  # a patch with itself is no pair
    assert position_nearness(wrong_of_itself) == pytest.approx(-1)


def test_the_bundled_model_knows_nearness() -> None:
    similarity = position_similarity(load_model("demo")).similarity
    assert position_nearness(similarity) == pytest.approx(-0.71, abs=0.005)  # its card


def test_errors_say_what_arrived() -> None:
    with pytest.raises(InputError, match=r"similarity has shape \(9, 9\); it must be \(row, col, row, col\)"):
        position_nearness(np.eye(9))
    with pytest.raises(InputError, match="all pairs of the 3 x 3 patches are equally far apart or equally alike"):
        position_nearness(np.full((3, 3, 3, 3), 0.5))
    for shape in ((1, 1, 1, 1), (1, 2, 1, 2)):
        with pytest.raises(InputError, match="needs pairs that differ in both"):
            position_nearness(np.random.default_rng(0).uniform(size=shape))
