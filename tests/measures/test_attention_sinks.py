"""Attention sinks: closed forms."""

from __future__ import annotations

import numpy as np

from tests.example_models import images, small_vit
from tests.measures.tiles import feed, identity_attention, random_attention, uniform_attention
from vit_probe import TokenGrid, attention_sinks

GRID = TokenGrid(3, 4, (8, 6), 2, True)
observer = attention_sinks.observer


def test_uniform_attention_has_no_sink() -> None:
    result = feed(observer(GRID), uniform_attention(GRID)).compute()
    assert list(result.values) == ["top_patch", "prefix_0", "prefix_1"]
    for name in result.values:
        np.testing.assert_allclose(result.values[name], 1 / 14, rtol=1e-6)
        np.testing.assert_allclose(result.uniform[name], 1 / 14, rtol=1e-12)


def test_identity_attention_gives_each_patch_its_own() -> None:
    result = feed(observer(GRID), identity_attention(GRID)).compute()
    np.testing.assert_allclose(result.top_patch, 1 / 12, rtol=1e-6)
    assert (result.prefix_0 == 0).all()
    assert (result.prefix_1 == 0).all()


def test_a_token_that_takes_all_attention() -> None:
    for token, name in ((0, "prefix_0"), (1, "prefix_1"), (9, "top_patch")):
        attention = np.zeros((1, 2, 2, 14, 14))
        attention[..., token] = 1
        result = feed(observer(GRID), attention, rows=5, heads=1).compute()
        assert {value: values.min() for value, values in result.values.items()} == {
            "top_patch": float(name == "top_patch"),
            "prefix_0": float(name == "prefix_0"),
            "prefix_1": float(name == "prefix_1"),
        }


def test_sinks_at_different_patches_of_two_images_do_not_cancel() -> None:
    attention = np.zeros((1, 2, 1, 14, 14))
    attention[:, 0, ..., 4] = attention[:, 1, ..., 9] = 1
    assert feed(observer(GRID), attention).compute().top_patch.item() == 1


def test_attention_of_prefix_tokens_does_not_count() -> None:
    attention = random_attention(GRID)
    other = attention.copy()
    other[..., :2, :] = 0
    other[..., :2, 5] = 1
    first, second = (feed(observer(GRID), one).compute() for one in (attention, other))
    for name in first.values:
        np.testing.assert_array_equal(first.values[name], second.values[name])


def test_a_model_without_prefix_tokens() -> None:
    result = attention_sinks(small_vit(class_token=False, pooling="avg"), images(), device="cpu")
    assert list(result.values) == ["top_patch"]
    assert (result.top_patch >= 1 / 12).all()
