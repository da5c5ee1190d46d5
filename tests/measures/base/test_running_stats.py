"""RunningStats: mean and standard deviation over images, in any split and order."""

from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vit_probe.measures.base.running_stats import RunningStats


@given(
    parts=st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(lambda parts: sum(parts) > 0),
    offset=st.sampled_from([0.0, 1e6]),
    seed=st.integers(0, 99),
    order=st.randoms(use_true_random=False),
)
def test_any_split_gives_the_moments_of_all_in_any_order(parts: list[int], offset: float, seed: int, order: Random) -> None:
    values = np.random.default_rng(seed).normal(size=(sum(parts), 2, 3)) + offset
    together, split = RunningStats.empty(2, 3), np.split(values, np.cumsum(parts)[:-1])
    order.shuffle(split)
    for rows in split:
        part = RunningStats.empty(2, 3)
        for row in rows:
            part.merge(RunningStats.from_samples(row[None]))
        together.merge(part)
    assert together.count == len(values)
    np.testing.assert_allclose(together.mean, values.mean(axis=0), rtol=1e-12, atol=1e-12)
    if len(values) > 1:
        np.testing.assert_allclose(together.std(), values.std(axis=0, ddof=1), rtol=1e-6)
        _, high = stats.t.interval(0.95, len(values) - 1, loc=0, scale=stats.sem(values, axis=0))
        np.testing.assert_allclose(together.confidence(), high, rtol=1e-6)
    else:
        assert np.isnan(together.std()).all()
        assert np.isnan(together.confidence()).all()
