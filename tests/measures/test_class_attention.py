"""The class token's attention: libraries' own weights, closed forms and invariances."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn import functional as F

from tests import reference
from tests.example_models import FAMILIES, Largest, expected_attention, images, output, small_vit, swin
from tests.measures.tiles import feed, grids, identity_attention, merged_shards, random_attention, tilings, uniform_attention
from vit_probe import InputError, Preprocessing, TokenGrid, attention_hooks, load_result
from vit_probe.measures import AttentionRollout
from vit_probe.measures.class_attention import ClassAttention, ClassAttentionResult, class_attention
from vit_probe.measures.map_statistics import head_correlation, kept_mass_mask
from vit_probe.runner.protocol import Measure, PerImage
from vit_probe.runner.resume import RunState, read_state, write_state
from vit_probe.runner.run import AttentionRun

GRID = TokenGrid(3, 4, (8, 6), 2, True)
LAYERS = ["blocks.0.attn", "blocks.1.attn"]
WITH_CLASS_TOKEN = [name for name, family in FAMILIES.items() if family.grid.has_cls_token]


def expected(attention: np.ndarray, grid: TokenGrid, layer: int = -1) -> np.ndarray:
    """Maps (image, head, row, col), one number at a time."""
    of_layer = attention[layer]
    maps = np.zeros((*of_layer.shape[:2], grid.rows, grid.cols))
    for image, head, row, col in np.ndindex(*maps.shape):
        maps[image, head, row, col] = of_layer[image, head, 0, grid.num_prefix_tokens + row * grid.cols + col]
    return maps


def measure(grid: TokenGrid = GRID, layer: int = -1) -> ClassAttention:
    return ClassAttention(grid, LAYERS, layer=layer)


# Against others


@pytest.mark.parametrize("layer", [0, 1, -1, -2])
@pytest.mark.parametrize("name", WITH_CLASS_TOKEN)
def test_models_of_every_family(name: str, layer: int) -> None:
    family = FAMILIES[name]
    model, x = family.model(), family.images()
    result = class_attention(model, x, layer=layer, batch_size=2, device="cpu")
    slow = expected(expected_attention(model, x), family.grid, layer)
    np.testing.assert_allclose(result.maps, slow, rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.prefix_mass, 1 - slow.sum(axis=(2, 3)), rtol=0, atol=1e-6)
    assert result.maps.std(axis=(2, 3)).min() > 1e-3
    assert (result.layer, result.module) == (layer % 2, AttentionRun(model, x, device="cpu").layers[layer])


@pytest.mark.parametrize("name", ["transformers-vit", "transformers-dinov2", "transformers-registers"])
def test_transformers_eager_attention(name: str) -> None:
    family = FAMILIES[name]
    model, x = family.model(), family.images()
    result = class_attention(model, x, device="cpu")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(x, output_attentions=True).attentions
    slow = expected(torch.stack(eager).double().numpy(), family.grid)
    np.testing.assert_allclose(result.maps, slow, rtol=0, atol=1e-6)


def test_timms_unfused_attention() -> None:
    family = FAMILIES["timm-registers"]
    model, x = family.model(), family.images()
    result = class_attention(model, x, device="cpu")
    unfused, kept = copy.deepcopy(model), []
    unfused.blocks[-1].attn.fused_attn = False
    unfused.blocks[-1].attn.attn_drop.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():
        unfused(x)
    np.testing.assert_allclose(result.maps, expected(torch.stack(kept).double().numpy(), family.grid), rtol=0, atol=1e-6)


# Closed forms


def test_uniform_attention() -> None:
    result = feed(measure(), uniform_attention(GRID)).compute()
    np.testing.assert_allclose(result.maps, np.full((3, 2, 3, 4), 1 / 14), rtol=1e-6)
    np.testing.assert_allclose(result.prefix_mass, np.full((3, 2), 2 / 14), rtol=1e-6)


def test_a_class_token_that_attends_to_itself() -> None:
    result = feed(measure(), identity_attention(GRID)).compute()
    np.testing.assert_array_equal(result.maps, np.zeros((3, 2, 3, 4)))
    np.testing.assert_array_equal(result.prefix_mass, np.ones((3, 2)))


# Properties


@settings(max_examples=40, deadline=None)
@given(grid=grids.filter(lambda grid: grid.has_cls_token), tiling=tilings, layer=st.integers(-2, 1), seed=st.integers(0, 99))
def test_random_attention_in_any_tiles(grid: TokenGrid, tiling: dict, layer: int, seed: int) -> None:
    attention = random_attention(grid, batch=4, heads=3, seed=seed)
    result = feed(measure(grid, layer), attention, **tiling).compute()
    np.testing.assert_array_equal(result.maps, expected(attention, grid, layer).astype(np.float32))


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(3)), cuts=st.lists(st.integers(0, 6), min_size=2, max_size=2).map(sorted))
def test_shards_are_put_in_order(order: list[int], cuts: list[int]) -> None:
    attention = random_attention(GRID, batch=6)
    whole = expected(attention, GRID).astype(np.float32)
    merged = merged_shards(measure, attention, order, cuts)
    bounds = [0, *cuts, 6]
    came = [image for shard in order for image in range(bounds[shard], bounds[shard + 1])]
    np.testing.assert_array_equal(merged.compute().maps, whole[came])
    merged.reorder(sorted(range(6), key=came.__getitem__))
    np.testing.assert_array_equal(merged.compute().maps, whole)
    assert isinstance(merged, Measure)
    assert isinstance(merged, PerImage)


def test_restore_continues_where_the_state_was_taken(tmp_path: Path) -> None:
    attention = random_attention(GRID, batch=7)
    first, second, empty = measure(), measure(), measure()
    feed(first, attention[:, :3])
    path = write_state(tmp_path / "state", {}, RunState({}, [first.state(), empty.state()]))
    found = read_state(path, {})
    assert found is not None
    second.restore(found.measures[0])
    feed(second, attention[:, 3:])
    np.testing.assert_array_equal(second.compute().maps, expected(attention, GRID).astype(np.float32))
    empty.restore(found.measures[1])
    with pytest.raises(InputError, match="no attention has been measured yet"):
        empty.compute()


def test_a_batch_that_is_rolled_back_leaves_nothing() -> None:
    attention = random_attention(GRID, batch=5)
    one = measure()
    for images_, failing in (([0, 1], False), ([2, 3], True), ([2], False), ([3, 4], False)):
        one.begin_batch()
        feed(one, attention[:, images_])
        one.end_batch()
        if failing:  # as when memory ends in another measure's end_batch
            one.roll_back()
    np.testing.assert_array_equal(one.compute().maps, expected(attention, GRID).astype(np.float32))


# Cost, masks and precision


class Attend(nn.Module):
    """One layer of attention with given queries and keys."""

    def forward(self, q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k, bias)


def queries_and_keys(tokens: int = 14, batch: int = 3, heads: int = 2, dim: int = 4) -> Tensor:
    """(2, image, head, token, dim)"""
    return 1.5 * torch.randn(2, batch, heads, tokens, dim, generator=torch.Generator().manual_seed(tokens))


def literal(q: Tensor, k: Tensor, bias: Tensor | None = None) -> np.ndarray:
    """(1, image, head, query, key)"""
    with np.errstate(invalid="ignore"):
        weights = reference.softmax_attention(
            q.double().numpy(), k.double().numpy(), q.shape[-1] ** -0.5, None if bias is None else bias.double().numpy()
        )
    return np.nan_to_num(weights)[None]


def test_the_fused_attention_runs_and_only_the_class_tokens_row_is_computed() -> None:
    grid = TokenGrid(32, 32, (4, 4), 1, True)
    q, k = queries_and_keys(1025, batch=1, heads=1)
    one = ClassAttention(grid, ["attn"])
    with attention_hooks(model := Attend(), one), Largest() as largest:
        result = model(q, k)
    assert largest.nbytes < 1025 * 1025 * 4 / 50
    torch.testing.assert_close(result, F.scaled_dot_product_attention(q, k, k), rtol=0, atol=0)
    np.testing.assert_allclose(one.compute().maps, expected(literal(q, k), grid), rtol=0, atol=1e-6)


def test_a_mask_and_a_class_token_that_may_attend_to_nothing() -> None:
    q, k = queries_and_keys()
    shut = torch.rand(3, 2, 14, 14, generator=torch.Generator().manual_seed(0)) > 0.7
    shut[1, 0, 0] = True
    bias = torch.zeros(shut.shape).masked_fill(shut, -torch.inf)
    with attention_hooks(model := Attend(), one := ClassAttention(GRID, ["attn"])):
        model(q, k, bias)
    slow = expected(literal(q, k, bias), GRID)
    assert not slow[1, 0].any()
    np.testing.assert_allclose(one.compute().maps, slow, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cast", [True, False])
def test_half_precision_and_autocast(cast: bool) -> None:
    """Only the model's queries and keys are rounded."""
    q, k = queries_and_keys().bfloat16()
    one = ClassAttention(GRID, ["attn"])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast), attention_hooks(model := Attend(), one):
        model(*((q.float(), k.float()) if cast else (q, k)))
    maps = one.compute().maps
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps, expected(literal(q, k), GRID), rtol=0, atol=1e-6)


def test_gradients_may_flow_beside_an_observer_of_tiles() -> None:
    model, x = small_vit(), images()
    grid = model.token_grid(24, 24)
    one, rollout = measure(grid), AttentionRollout(grid)
    with attention_hooks(model, one, rollout):
        output(model(x)).sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    slow = expected_attention(model, x)
    np.testing.assert_allclose(one.compute().maps, expected(slow, grid), rtol=0, atol=1e-6)
    assert rollout.compute().maps.shape == (3, 3, 4)


# The result


@pytest.fixture(scope="module")
def result() -> ClassAttentionResult:
    model = small_vit(num_heads=4)
    model.preprocessing = Preprocessing(size=(24, 24), resize=24)
    return class_attention(model, images(), layer=0, device="cpu")


def test_dataframe_has_one_row_per_image_head_and_patch(result: ClassAttentionResult) -> None:
    frame = result.to_dataframe()
    assert list(frame) == ["image", "name", "head", "row", "col", "attention"]
    assert len(frame) == 3 * 4 * 3 * 4
    assert list(frame.name.unique()) == ["image 0", "image 1", "image 2"]
    one = frame[(frame.image == 2) & (frame["head"] == 3) & (frame.row == 1) & (frame.col == 2)]
    assert one.attention.tolist() == [result.maps[2, 3, 1, 2]]


def test_summary_has_one_row_per_head(result: ClassAttentionResult) -> None:
    summary = result.summary()
    assert summary["head"].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(summary["prefix mass"], 1 - result.maps.sum(axis=(2, 3)).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(summary["patches with 60 %"], kept_mass_mask(result.maps).sum(axis=(2, 3)).mean(axis=0) / 12)
    np.testing.assert_allclose(summary["correlation with others"], head_correlation(result.maps).mean(axis=0))


def test_a_constant_map_spoils_no_other_numbers(result: ClassAttentionResult) -> None:
    """Only the pairs with the constant map are left out of the means of its head and its image."""
    maps = np.concatenate([result.maps, result.maps[:, :1] ** 2], axis=1)
    expected = head_correlation(maps)
    maps[0, 0] = 0.01
    changed = replace(result, maps=maps)
    pairs = head_correlation(maps)
    assert changed.summary()["correlation with others"][0] == pytest.approx(expected[1:, 0].mean())
    assert changed.beside(maps[:, 1])["heads_correlation"][0] == pytest.approx(pairs[0, 1:].mean())


def test_beside_rollout(result: ClassAttentionResult) -> None:
    rollout = np.random.default_rng(0).random((3, 3, 4))
    table = result.beside(rollout)
    assert table.name.tolist() == result.names
    for image, row in enumerate(table.itertuples()):
        flat = result.maps[image].reshape(4, 12).astype(np.float64)
        pairs = np.corrcoef(flat)[np.triu_indices(4, 1)]
        assert row.heads_correlation == pytest.approx(pairs.mean())
        assert row.rollout_correlation == pytest.approx(np.corrcoef(flat.mean(axis=0), rollout[image].ravel())[0, 1], abs=1e-6)
        assert row.heads_patches == pytest.approx(kept_mass_mask(result.maps[image]).sum() / 48)
        assert row.rollout_patches == pytest.approx(kept_mass_mask(rollout[image]).sum() / 12)


@pytest.mark.parametrize("keep", [True, False])
def test_saved_and_read_back(result: ClassAttentionResult, tmp_path: Path, keep: bool) -> None:
    result = result if keep else replace(result, images=None)
    again = load_result(result.save(tmp_path / "class_attention.safetensors"))
    assert isinstance(again, ClassAttentionResult)
    np.testing.assert_array_equal(again.maps, result.maps)
    assert (again.images is None) is not keep
    assert (again.layer, again.module, again.names) == (0, "blocks.0.attn", result.names)
    assert again.provenance == result.provenance
    assert again.provenance["options"] == {"layer": 0}
    assert isinstance(again.plot(heads=[1, 0], count=2), Axes)


# Errors


def test_a_model_without_class_token() -> None:
    with pytest.raises(InputError, match="has no class token whose attention could be shown; attention_rollout takes the mean"):
        class_attention(small_vit(class_token=False, pooling="avg"), images(), device="cpu")


def test_windows() -> None:
    with pytest.raises(
        InputError, match=r"4 layers of this model \(the first is layer 0\) attend within windows.*use mean_att"
    ):
        class_attention(swin(), images(48, 48), device="cpu")


@pytest.mark.parametrize("layer", [2, -3])
def test_a_layer_that_does_not_exist(layer: int) -> None:
    with pytest.raises(InputError, match=rf"layer is {layer}, but this model has layers 0 to 1 \(or -2 to -1\)"):
        class_attention(small_vit(), images(), layer=layer, device="cpu")


def test_other_tokens_than_the_grids() -> None:
    with pytest.raises(InputError, match=r"attention covers 13 tokens, but TokenGrid.*accounts for 14"):  # noqa: SIM117
        with attention_hooks(model := Attend(), ClassAttention(GRID, ["attn"])):
            model(*queries_and_keys(13))


def test_nothing_measured() -> None:
    with pytest.raises(InputError, match="no attention has been measured yet"):
        measure().compute()


def test_attention_that_is_not_finite() -> None:
    one = feed(measure(), np.full((2, 1, 2, 14, 14), np.nan), disposable=True)
    with pytest.raises(InputError, match="maps of the class token's attention are not all finite"):
        one.compute()


@pytest.mark.parametrize("other", [measure(layer=0), measure(TokenGrid(4, 3, (8, 6), 2, True))])
def test_shards_that_do_not_belong_together(other: ClassAttention) -> None:
    with pytest.raises(InputError, match="cannot merge maps of the class token's attention of"):
        measure().merge(other)
