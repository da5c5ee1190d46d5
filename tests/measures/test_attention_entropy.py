"""Attention entropy: the literal reference, closed forms and invariances."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests import reference
from tests.example_models import FAMILIES, Assemble, expected_attention, images, small_vit, swin
from tests.measures.tiles import (
    FailsAfter,
    arrays_of,
    feed,
    grids,
    identity_attention,
    merged_shards,
    random_attention,
    tilings,
    uniform_attention,
)
from vit_probe import InputError, TokenGrid, attention_entropy, attention_hooks, load_result, mean_attention_distance
from vit_probe.measures.base.head_measure import HeadMeasure
from vit_probe.measures.base.per_head import HeadResult
from vit_probe.measures.rollout import AttentionRollout
from vit_probe.runner.run import AttentionRun
from vit_probe.tokens.grid import Windows
from vit_probe.tokens.locate import locate_tokens

GRID = TokenGrid(3, 4, (8, 6), 2, True)
VALUES = ["entropy", "prefix_mass", "self_mass"]
observer = attention_entropy.observer


def agrees(result: HeadResult, attention: np.ndarray, grid: TokenGrid, tolerance: float = 1e-5) -> None:
    slow = reference.attention_entropy(attention, grid.num_prefix_tokens, ddof=1)
    assert list(result.values) == VALUES
    for name, expected in zip(VALUES, (slow.mean, slow.prefix_mass, slow.self_mass), strict=True):
        np.testing.assert_allclose(getattr(result, name), expected, rtol=0, atol=tolerance, err_msg=name)
    np.testing.assert_allclose(result.std["entropy"], slow.std, rtol=0, atol=tolerance)


class Attention(torch.nn.Module):
    """The fused attention of its inputs, as a model."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, key, mask)


def queries_and_keys(size: float = 1.0, *, tokens: int = 14) -> torch.Tensor:
    """(2, image, head, token, dim)"""
    return size * torch.randn(2, 2, 3, tokens, 8, generator=torch.Generator().manual_seed(0))


# Against the reference


@settings(max_examples=40, deadline=None)
@given(grid=grids, batch=st.integers(1, 4), tiling=tilings, seed=st.integers(0, 99))
def test_random_attention_in_any_tiles(grid: TokenGrid, batch: int, tiling: dict, seed: int) -> None:
    attention = random_attention(grid, batch=batch, heads=3, sharpness=4, seed=seed)
    result = feed(observer(grid), attention, **tiling).compute()
    agrees(result, attention, grid)
    assert result.num_images == batch
    assert result.modules == ["blocks.0.attn", "blocks.1.attn"]
    np.testing.assert_allclose(result.uniform_entropy, [math.log(grid.num_tokens)] * 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_every_family(name: str) -> None:
    family = FAMILIES[name]
    model, x = family.model(), family.images()
    attention = expected_attention(model, x)
    result = attention_entropy(model, x, batch_size=2, device="cpu")
    agrees(result, attention, family.grid)
    assert result.entropy.std() > 0.01  # else the comparison would be empty


# Closed forms


def test_identity_attention_is_certain() -> None:
    result = feed(observer(GRID), identity_attention(GRID)).compute()
    np.testing.assert_allclose(result.entropy, 0, atol=1e-6)
    assert (result.self_mass == 1).all()
    assert (result.prefix_mass == 0).all()


def test_uniform_attention_has_the_logarithm_of_the_tokens() -> None:
    result = feed(observer(GRID), uniform_attention(GRID)).compute()
    np.testing.assert_allclose(result.entropy, math.log(14), rtol=1e-6)
    np.testing.assert_allclose(result.uniform_entropy, [math.log(14)] * 2, rtol=1e-12)
    np.testing.assert_allclose(result.uniform_prefix_mass, [2 / 14] * 2, rtol=1e-12)
    np.testing.assert_allclose(result.prefix_mass, 2 / 14, rtol=1e-6)
    np.testing.assert_allclose(result.self_mass, 1 / 14, rtol=1e-6)


@pytest.mark.parametrize("left", [0.0, 1e-45, 1e-38])
def test_all_attention_on_the_class_token(left: float) -> None:
    attention = np.full((1, 2, 2, 14, 14), left)
    attention[..., 0] = 1
    result = feed(observer(GRID), attention).compute()
    np.testing.assert_allclose(result.entropy, 0, atol=1e-6)
    np.testing.assert_allclose(result.prefix_mass, 1, rtol=1e-6)
    assert (result.self_mass < 1e-36).all()


def test_prefix_tokens_are_not_queries() -> None:
    attention = random_attention(GRID)
    other = attention.copy()
    other[..., :2, :] = 1 / 14
    first, second = (feed(observer(GRID), a).compute() for a in (attention, other))
    for name in VALUES:
        np.testing.assert_array_equal(first.values[name], second.values[name])
        np.testing.assert_array_equal(first.std[name], second.std[name])


# Precision and masks


@pytest.mark.parametrize("tile_bytes", [1, 700, 1 << 20])
def test_large_scores_cost_no_precision(tile_bytes: int) -> None:
    q, k = queries_and_keys(6.0)
    assert (q @ k.mT / 8**0.5).abs().max() > 100
    with attention_hooks(model := Attention(), measure := observer(GRID), tile_bytes=tile_bytes):
        model(q, k)
    attention = reference.softmax_attention(q, k, 8**-0.5)[None]
    agrees(measure.compute(), attention, GRID, 1e-4)
    assert 0.01 < measure.compute().entropy.mean() < 1


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("tile_bytes", [1, 700, 1 << 20])
def test_masks(additive: bool, tile_bytes: int) -> None:
    q, k = queries_and_keys()
    keep = torch.rand(2, 3, 14, 14, generator=torch.Generator().manual_seed(3)) > 0.4
    keep[0, 1, 5] = keep[1, :, 9] = False  # all keys masked
    mask = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(4)).masked_fill(~keep, -torch.inf)
    with attention_hooks(model := Attention(), measure := observer(GRID), tile_bytes=tile_bytes):
        model(q, k, mask if additive else keep)
    with np.errstate(invalid="ignore"):
        attention = reference.softmax_attention(q, k, 8**-0.5, mask if additive else keep)
    assert np.isnan(attention).any()
    agrees(measure.compute(), np.nan_to_num(attention)[None], GRID)


def test_a_finite_mask_of_everything_hides_nothing() -> None:
    mask = torch.full((14, 14), torch.finfo(torch.float32).min)
    with attention_hooks(model := Attention(), measure := observer(GRID)):
        model(*queries_and_keys(), mask)
    np.testing.assert_allclose(measure.compute().entropy, np.log(14), rtol=1e-6)


def test_a_query_whose_keys_are_all_masked_has_no_entropy() -> None:
    with attention_hooks(model := Attention(), measure := observer(GRID)):
        model(*queries_and_keys(), torch.zeros(14, 14, dtype=torch.bool))
    result = measure.compute()
    for name in VALUES:
        assert (result.values[name] == 0).all()
        assert (result.std[name] == 0).all()


# Properties


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(4)), cuts=st.lists(st.integers(0, 6), min_size=3, max_size=3).map(sorted))
def test_shards_merge_in_any_order(order: list[int], cuts: list[int]) -> None:
    attention = random_attention(GRID, batch=6)
    whole = feed(observer(GRID), attention).compute()
    merged = merged_shards(lambda: observer(GRID), attention, order, cuts).compute()
    assert merged.num_images == 6
    for name in VALUES:
        np.testing.assert_allclose(merged.values[name], whole.values[name], rtol=0, atol=1e-5)
        np.testing.assert_allclose(merged.std[name], whole.std[name], rtol=0, atol=1e-5)


def test_restore_continues_where_the_state_was_taken() -> None:
    attention = random_attention(GRID, batch=5)
    first, second = feed(observer(GRID), attention[:, :2]), observer(GRID)
    second.restore(first.state())
    agrees(feed(second, attention[:, 2:]).compute(), attention, GRID)


def test_one_image_has_no_spread() -> None:
    result = attention_entropy(small_vit(), images(batch=1), device="cpu")
    assert result.num_images == 1
    assert np.isnan(result.std["entropy"]).all()
    assert np.isnan(result.confidence["entropy"]).all()
    assert np.isfinite(result.entropy).all()


def test_an_interrupted_image_does_not_count() -> None:
    attention = random_attention(GRID)
    measure = feed(observer(GRID), attention)
    with pytest.raises(RuntimeError, match="interrupted"):
        feed(FailsAfter(measure, tiles=1), attention[:, :1], rows=5)
    agrees(measure.compute(), attention, GRID)
    agrees(feed(measure, attention).compute(), np.concatenate([attention, attention], axis=1), GRID)


def test_non_square_images() -> None:
    model, x = small_vit(), images(16, 36)
    agrees(attention_entropy(model, x, device="cpu"), expected_attention(model, x), TokenGrid(2, 6, (8, 6), 1, True))


# Windows


def windowed(attention: np.ndarray, patches: np.ndarray) -> list[np.ndarray]:
    """Entropy, padding mass and self mass (image, head) of attention (window, head, query, key), in loops."""
    images, heads = len(attention) // len(patches), attention.shape[1]
    entropy, padding, itself = np.zeros((3, images, heads))
    for image in range(images):
        for window, tokens in enumerate(patches.tolist()):
            for query, patch in enumerate(tokens):
                if patch < 0:
                    continue
                for head in range(heads):
                    weights = attention[image * len(patches) + window, head, query].tolist()
                    entropy[image, head] -= sum(weight * math.log(weight) for weight in weights if weight > 0)
                    padding[image, head] += sum(weight for weight, key in zip(weights, tokens, strict=True) if key < 0)
                    itself[image, head] += weights[query]
    return [values / (patches >= 0).sum() for values in (entropy, padding, itself)]


def agrees_in_windows(result: HeadResult, layer: int, attention: np.ndarray, windows: Windows) -> None:
    entropy, padding, itself = windowed(attention, windows.patches.numpy())
    heads = entropy.shape[1]
    np.testing.assert_allclose(result.entropy[layer, :heads], entropy.mean(0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(result.std["entropy"][layer, :heads], entropy.std(0, ddof=1), rtol=0, atol=1e-5)
    np.testing.assert_allclose(result.prefix_mass[layer, :heads], padding.mean(0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.self_mass[layer, :heads], itself.mean(0), rtol=0, atol=1e-6)
    assert result.uniform_entropy[layer] == pytest.approx(math.log(windows.patches.shape[1]))


@settings(max_examples=20, deadline=None)
@given(images=st.integers(1, 5), rows=st.integers(1, 5), heads=st.integers(1, 2), seed=st.integers(0, 99))
def test_padded_windows_in_any_tiles(images: int, rows: int, heads: int, seed: int) -> None:
    windows = Windows(TokenGrid(2, 3, (8, 4), 0, False), torch.tensor([[0, 1, 3, 4], [2, -1, 5, -1]]))
    attention = random_attention(TokenGrid(2, 2, (8, 4), 0, False), layers=1, batch=6, seed=seed)
    measure = observer(windows.grid, windows={0: windows})
    result = feed(measure, attention, images=images, rows=rows, heads=heads).compute()
    assert result.num_images == 3
    assert (result.prefix_mass > 0.05).all()  # on padding
    agrees_in_windows(result, 0, attention[0], windows)


def test_shifted_windows_of_a_model() -> None:
    model, x = swin(), images(48, 48)
    windows = locate_tokens(model, 48, 48).windows
    assert any(one.masked_pairs is not None for one in windows.values())
    with torch.no_grad(), attention_hooks(model, seen := Assemble()):
        model(x)
    result = attention_entropy(model, x, batch_size=2, device="cpu")
    assert result.num_images == 3
    assert np.isnan(result.entropy).tolist() == [[False, True]] * 2 + [[False] * 2] * 2
    for layer, one in windows.items():
        agrees_in_windows(result, layer, seen.layers[layer], one)


# The result


@pytest.fixture(scope="module")
def result() -> HeadResult:
    return attention_entropy(small_vit(depth=3), images(), device="cpu")


def test_dataframe_has_one_row_per_head(result: HeadResult) -> None:
    frame = result.to_dataframe()
    measured = ["entropy", "std", "confidence", "prefix_mass", "self_mass"]
    assert list(frame) == ["layer", "module", "head", *measured, "uniform_entropy", "num_windows", "num_images"]
    assert frame.module.tolist() == [f"blocks.{layer}.attn" for layer in (0, 0, 1, 1, 2, 2)]
    assert frame[["layer", "head"]].to_numpy().tolist() == [[layer, head] for layer in range(3) for head in range(2)]
    row = frame[(frame.layer == 2) & (frame["head"] == 1)].iloc[0]
    assert [row[name] for name in VALUES] == [result.values[name][2, 1] for name in VALUES]
    assert (row["std"], row["confidence"]) == (result.std["entropy"][2, 1], result.confidence["entropy"][2, 1])
    np.testing.assert_allclose(frame.uniform_entropy, math.log(13), rtol=1e-12)
    assert set(frame.num_images) == {3}
    assert frame.attrs["skipped"] == {}


def test_summary_has_one_row_per_layer(result: HeadResult) -> None:
    summary = result.summary()
    assert summary["layer"].tolist() == [0, 1, 2]
    np.testing.assert_allclose(summary["mean entropy (nats)"], result.entropy.mean(1))
    np.testing.assert_allclose(summary["lowest head"], result.entropy.min(1))
    np.testing.assert_allclose(summary["highest head"], result.entropy.max(1))
    np.testing.assert_allclose(summary["prefix mass"], result.prefix_mass.mean(1))
    np.testing.assert_allclose(summary["self mass"], result.self_mass.mean(1))


def test_saved_and_read_back(result: HeadResult, tmp_path: Path) -> None:
    again = load_result(result.save(tmp_path / "entropy.safetensors"))
    assert isinstance(again, HeadResult)
    for field in ("values", "std", "confidence", "uniform"):
        mine, theirs = getattr(again, field), getattr(result, field)
        assert list(mine) == list(theirs) == VALUES
        for name in VALUES:
            np.testing.assert_array_equal(mine[name], theirs[name])
    assert (again.modules, again.num_images) == (result.modules, 3)
    assert again.provenance == result.provenance
    assert again.provenance["options"] == {}
    assert again.to_dataframe().equals(result.to_dataframe())


def test_the_confidence_is_students(result: HeadResult) -> None:
    half_width = 4.302652729911275 * result.std["entropy"] / 3**0.5  # 2 degrees of freedom
    np.testing.assert_allclose(result.confidence["entropy"], half_width)


# Errors


def test_nothing_measured() -> None:
    with pytest.raises(InputError, match="no values of attention_entropy have been measured yet"):
        observer(GRID).compute()


def test_a_grid_that_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"makes 13 tokens of images of 24 x 24 pixels.*TokenGrid.*accounts for 14; pass"):
        attention_entropy(small_vit(), images(), grid=GRID, device="cpu")
    with pytest.raises(InputError, match=r"attention covers 13 tokens, but TokenGrid.*accounts for 14; pass the grid"):
        feed(observer(GRID), random_attention(TokenGrid(3, 4, (8, 6), 1, True)))


def test_attention_that_is_not_finite() -> None:
    with pytest.raises(InputError, match="values of attention_entropy are not all finite"):
        attention_entropy(small_vit(), images() * 1e37, device="cpu")


@pytest.mark.parametrize(
    "other",
    [
        feed(observer(replace(GRID, patch_size=(8, 8))), random_attention(GRID)),
        feed(observer(GRID), random_attention(GRID, layers=3)),
        feed(observer(GRID), random_attention(GRID, heads=1)),
    ],
)
def test_shards_that_do_not_belong_together(other: HeadMeasure) -> None:
    measure = feed(observer(GRID), random_attention(GRID))
    with pytest.raises(InputError, match="cannot merge values of attention_entropy"):
        measure.merge(other)
    agrees(measure.compute(), random_attention(GRID), GRID)


# Beside the other measures


def test_beside_distance_and_rollout_the_numbers_are_the_same() -> None:
    model, x = small_vit(num_registers=1), images(batch=5)
    grid = model.token_grid(24, 24)
    kinds = (observer, mean_attention_distance.observer, AttentionRollout)
    together = [kind(grid) for kind in kinds]
    AttentionRun(model, x, batch_size=2, device="cpu").observe(*together)
    for kind, measure in zip(kinds, together, strict=True):
        AttentionRun(model, x, batch_size=2, device="cpu").observe(alone := kind(grid))
        mine, theirs = (arrays_of(one.compute()) for one in (measure, alone))
        assert list(mine) == list(theirs)
        assert len(mine) > 0
        for name, values in theirs.items():
            np.testing.assert_allclose(mine[name], values, rtol=1e-6, err_msg=name)
