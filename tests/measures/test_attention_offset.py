"""Attention offset: closed forms, and the pictures and tables of its result."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.example_models import images, small_vit
from tests.measures.tiles import feed, identity_attention, random_attention, tilings, uniform_attention
from vit_probe import TokenGrid, attention_offset, local_mass, mean_attention_distance
from vit_probe.measures.attention_offset import AttentionOffsetResult

GRID = TokenGrid(3, 4, (8, 6), 2, True)
observer = attention_offset.observer


def shifted(down: int, right: int) -> np.ndarray:
    """Each patch attends to the patch so many rows below and columns to the right, around the edges."""
    attention = np.zeros((1, 2, 1, 14, 14))
    for query in range(12):
        row, col = divmod(query, 4)
        attention[..., 2 + query, 2 + (row + down) % 3 * 4 + (col + right) % 4] = 1
    return attention


def test_identity_attention_lies_in_the_centre() -> None:
    result = feed(observer(GRID), identity_attention(GRID)).compute()
    assert (result.dx == 0).all()
    assert (result.dy == 0).all()
    assert (result.length == 0).all()
    assert result.aligned.shape == (2, 2, 5, 7)
    assert (result.aligned[:, :, 2, 3] == 1).all()
    assert result.aligned.sum() == 4


def test_uniform_attention_has_no_direction() -> None:
    """At the offset of v rows and u columns there are (3 - |v|) (4 - |u|) of the 144 pairs of patches."""
    result = feed(observer(GRID), uniform_attention(GRID)).compute()
    np.testing.assert_allclose(result.dx, 0, atol=1e-6)
    np.testing.assert_allclose(result.dy, 0, atol=1e-6)
    pairs = np.outer([1, 2, 3, 2, 1], [1, 2, 3, 4, 3, 2, 1]) / 144
    np.testing.assert_allclose(result.aligned, np.broadcast_to(pairs, (2, 2, 5, 7)), rtol=1e-5)
    np.testing.assert_allclose(result.uniform_dx, 0, atol=1e-12)


def test_a_head_that_attends_to_its_right() -> None:
    result = feed(observer(GRID), shifted(0, 1)).compute()
    assert result.dx.item() == pytest.approx(6 * (1 + 1 + 1 - 3) / 4)  # the last column wraps around
    assert result.aligned[0, 0, 2].tolist() == [0.25, 0, 0, 0, 0.75, 0, 0]
    result = feed(observer(GRID), shifted(1, 0)).compute()
    assert result.dy.item() == pytest.approx(8 * (1 + 1 - 2) / 3, abs=1e-6)
    assert result.aligned[0, 0, :, 3].tolist() == [pytest.approx(1 / 3), 0, 0, pytest.approx(2 / 3), 0]


def test_all_attention_on_the_class_token_has_no_offset() -> None:
    attention = np.zeros((1, 2, 2, 14, 14))
    attention[..., 0] = 1
    result = feed(observer(GRID), attention).compute()
    for value in (result.dx, result.dy, result.aligned):
        assert np.isnan(value).all()
    assert (result.to_dataframe()["excluded"] == 1).all()


def test_prefix_tokens_change_nothing_but_the_scale() -> None:
    attention = random_attention(GRID)
    more = attention.copy()
    more[..., 2:] *= 0.25
    more[..., 0] += 1 - more.sum(-1)
    first, second = (feed(observer(GRID), one).compute() for one in (attention, more))
    for value in ("dx", "dy", "aligned"):
        np.testing.assert_allclose(second.values[value], first.values[value], rtol=1e-4, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(tiling=tilings, seed=st.integers(0, 99))
def test_the_aligned_map_holds_the_other_measures(tiling: dict, seed: int) -> None:
    """Offset, distance and local mass are sums over it."""
    attention = random_attention(GRID, seed=seed)
    result, distance, local = (
        feed(one.observer(GRID), attention, **tiling).compute()
        for one in (attention_offset, mean_attention_distance, local_mass)
    )
    down, right = 8 * np.arange(-2, 3)[:, None], 6 * np.arange(-3, 4)
    sums = {
        "dx": (result.aligned * right).sum((2, 3)),
        "dy": (result.aligned * down).sum((2, 3)),
    }
    for value, expected in sums.items():
        np.testing.assert_allclose(result.values[value], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(distance.distance, (result.aligned * np.hypot(down, right)).sum((2, 3)), rtol=1e-4)
    np.testing.assert_allclose(local.local_mass, result.aligned[:, :, 1:4, 2:5].sum((2, 3)), rtol=1e-4)


def test_length_is_a_column_of_both_tables() -> None:
    result = attention_offset(small_vit(), images(), per_image=True, device="cpu")
    assert isinstance(result, AttentionOffsetResult)
    frame = result.to_dataframe()
    assert list(frame) == [
        *("layer", "module", "head", "dx", "std", "confidence", "dy", "length", "uniform_dx", "num_windows", "num_images")
    ]
    np.testing.assert_array_equal(frame["length"], result.length.ravel())
    np.testing.assert_array_equal(result.length, np.sqrt(result.dx**2 + result.dy**2))
    of_images = result.to_dataframe(per_image=True)
    assert list(of_images) == ["image", "name", "layer", "module", "head", "dx", "dy", "length"]
    np.testing.assert_array_equal(of_images["length"], np.hypot(of_images["dx"], of_images["dy"]))


def test_kinds_of_pictures() -> None:
    result = attention_offset(small_vit(depth=3), images(), device="cpu")
    assert len(result.plot().images) == 6
    axes = result.plot(layers=[2])
    assert len(axes.images) == 2
    np.testing.assert_allclose(axes.images[1].get_array(), np.sqrt(result.aligned[2, 1]))
    for kind in ("depth", "sorted"):
        axes = result.plot(kind=kind, layers=[0, 2])
        assert axes.images == [] or len(axes.images) == 0
        assert axes.get_ylabel() == f"{result.label} (pixels)"
    dots = result.plot(kind="depth").collections[-1]
    np.testing.assert_array_equal(np.asarray(dots.get_offsets())[:, 1], result.dx.ravel())
