"""A small table of attention distances, and a check that plots leave global state alone."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

mpl.use("Agg")


@pytest.fixture
def frame() -> pd.DataFrame:
    """Six layers of four heads with random distances."""
    layer, head = (index.ravel() for index in np.indices((6, 4)))
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "layer": layer,
            "head": head,
            "distance": rng.uniform(20, 110, 24),
            "std": rng.uniform(1, 9, 24),
            "patch_mass": rng.uniform(0.3, 1, 24),
            "uniform_distance": 116.5,
            "num_images": 32,
        }
    )


@pytest.fixture(autouse=True)
def _no_global_state() -> Iterator[None]:
    """No plot may register a figure with pyplot or leave a setting changed."""
    import matplotlib.pyplot as plt

    before = mpl.rcParams.copy()
    yield
    assert plt.get_fignums() == []
    assert mpl.rcParams == before
