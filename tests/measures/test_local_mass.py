"""Local mass: closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from tests.measures.tiles import feed, identity_attention, random_attention, uniform_attention
from vit_probe import TokenGrid, local_mass

GRID = TokenGrid(3, 4, (8, 6), 2, True)
observer = local_mass.observer


def test_identity_attention_is_local() -> None:
    assert (feed(observer(GRID, radius=0.0), identity_attention(GRID)).compute().local_mass == 1).all()


def test_uniform_attention_counts_neighbours() -> None:
    """Of 3 x 4 patches, 2 have nine patches within the default radius, 6 at the edges have six and 4 corners four."""
    share = (2 * 9 + 6 * 6 + 4 * 4) / 144
    renormalized, dropped = (
        feed(observer(GRID, prefix=prefix), uniform_attention(GRID)).compute() for prefix in ("renormalize", "drop")
    )
    np.testing.assert_allclose(renormalized.local_mass, share, rtol=1e-6)
    np.testing.assert_allclose(dropped.local_mass, share * 12 / 14, rtol=1e-6)
    for result in (renormalized, dropped):
        np.testing.assert_allclose(result.uniform_local_mass, share, rtol=1e-12)


@pytest.mark.parametrize(("radius", "share"), [(0.99, 12), (1.0, 12 + 2 * 9 + 2 * 8), (1.5, 70), (3.7, 144)])
def test_the_radius_is_in_patches_and_inclusive(radius: float, share: int) -> None:
    """Pairs of patches: 12 with themselves, 9 horizontal and 8 vertical neighbours both ways, 2 * 12 diagonal ones."""
    result = feed(observer(GRID, radius=radius), uniform_attention(GRID)).compute()
    np.testing.assert_allclose(result.local_mass, share / 144, rtol=1e-6)


def test_a_larger_radius_holds_more() -> None:
    attention = random_attention(GRID)
    masses = [feed(observer(GRID, radius=radius), attention).compute().local_mass for radius in (0, 1, 1.5, 2, 4)]
    assert (np.diff(masses, axis=0) > 0).all()
    np.testing.assert_allclose(masses[-1], 1, rtol=1e-6)
