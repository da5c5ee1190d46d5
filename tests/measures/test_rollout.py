"""Attention rollout: the literal reference, closed forms and invariances."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from torch import nn
from torch.nn import functional as F

from tests import reference
from tests.example_models import FAMILIES, Assemble, Largest, expected_attention, images, small_vit
from tests.measures.tiles import FailsAfter, feed, grids, identity_attention, random_attention, tilings, uniform_attention
from vit_probe import InputError, Preprocessing, TokenGrid, attention_hooks, attention_rollout, load_result
from vit_probe.attention.tiles import AttentionInputs, TiledAttention
from vit_probe.measures import AttentionRollout, AttentionRolloutResult, rollout_algorithms
from vit_probe.measures.rollout_algorithms import Algorithm, cheapest_algorithm
from vit_probe.runner.run import AttentionRun

GRID = TokenGrid(3, 4, (8, 6), 2, True)
BARE = TokenGrid(3, 4, (8, 6), 1, False)
FUSIONS = ["mean", "max", "min"]
ALGORITHMS: tuple[Algorithm, ...] = ("product", "maps", "recomputed")


def expected(attention: np.ndarray, grid: TokenGrid, fusion: str = "mean", ratio: float = 0.0) -> np.ndarray:
    matrices = reference.rollout(attention, fusion, ratio, has_cls_token=grid.has_cls_token)
    return reference.rollout_map(matrices, grid.rows, grid.cols, grid.num_prefix_tokens, grid.has_cls_token)


# Against the reference


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("grid", [GRID, BARE], ids=["class token", "none"])
def test_fusion_and_discarding(fusion: str, ratio: float, grid: TokenGrid) -> None:
    attention = random_attention(grid, layers=3, heads=3)
    result = feed(AttentionRollout(grid, head_fusion=fusion, discard_ratio=ratio), attention, images=2, rows=5).compute()
    np.testing.assert_allclose(result.maps, expected(attention, grid, fusion, ratio), rtol=0, atol=1e-6)
    assert (result.head_fusion, result.discard_ratio) == (fusion, ratio)
    if ratio or fusion != "mean":  # the option matters
        assert abs(result.maps - expected(attention, grid)).max() > 1e-3


@settings(max_examples=40, deadline=None)
@given(grid=grids, batch=st.integers(1, 4), tiling=tilings, ratio=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 99))
def test_random_attention_in_any_tiles(grid: TokenGrid, batch: int, tiling: dict, ratio: float, seed: int) -> None:
    attention = random_attention(grid, layers=3, batch=batch, seed=seed)
    result = feed(AttentionRollout(grid, discard_ratio=ratio), attention, **tiling).compute()
    np.testing.assert_allclose(result.maps, expected(attention, grid, ratio=ratio), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_every_family_by_every_algorithm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    model, x = family.model(), family.images()
    attention = expected_attention(model, x)
    run = AttentionRun(model, x, batch_size=2, device="cpu")
    for algorithm in ALGORITHMS:
        use(algorithm, monkeypatch)
        measures = [
            AttentionRollout(family.grid, head_fusion=fusion, discard_ratio=ratio)
            for fusion, ratio in (("mean", 0.0), ("max", 0.9), ("min", 0.0), ("mean", 0.5))
        ]
        run.observe(*measures)
        for measure in measures:
            result = measure.compute()
            slow = expected(attention, family.grid, measure.head_fusion, measure.discard_ratio)
            np.testing.assert_allclose(result.maps, slow, rtol=0, atol=1e-6)
            assert result.maps.std(axis=(1, 2)).min() > 1e-3
            assert result.algorithm == algorithm


@pytest.mark.parametrize(
    ("width", "size", "algorithm"), [(24, (24, 24), "product"), (16, (24, 24), "maps"), (4, (40, 36), "recomputed")]
)
def test_the_algorithm_is_chosen_by_tokens_and_width(width: int, size: tuple[int, int], algorithm: Algorithm) -> None:
    model, x = small_vit(embed_dim=width), images(*size)
    result = attention_rollout(model, x, device="cpu")
    assert result.algorithm == algorithm
    np.testing.assert_allclose(result.maps, expected(expected_attention(model, x), model.token_grid(*size)), rtol=0, atol=1e-6)


# Closed forms


@pytest.mark.parametrize("fusion", FUSIONS)
def test_identity_attention_reaches_nothing_from_the_class_token(fusion: str) -> None:
    result = feed(AttentionRollout(GRID, head_fusion=fusion), identity_attention(GRID)).compute()
    np.testing.assert_array_equal(result.maps, np.zeros((3, 3, 4)))
    result = feed(AttentionRollout(BARE, head_fusion=fusion), identity_attention(BARE)).compute()
    np.testing.assert_allclose(result.maps, np.full((3, 3, 4), 1 / 12), rtol=1e-6)


def test_uniform_attention_draws_on_all_tokens_alike() -> None:
    result = feed(AttentionRollout(GRID), uniform_attention(GRID)).compute()
    # A = I / 2 + U / 2, U the mean over tokens: A A = I / 4 + 3 U / 4.
    np.testing.assert_allclose(result.maps, np.full((3, 3, 4), 0.75 / 14), rtol=1e-6)


def test_without_prefix_tokens_each_map_sums_to_one() -> None:
    grid = TokenGrid(3, 4, (8, 6), 0, False)
    result = feed(AttentionRollout(grid, discard_ratio=0.5), random_attention(grid)).compute()
    np.testing.assert_allclose(result.maps.sum(axis=(1, 2)), 1, rtol=1e-6)


def test_layers_multiply_from_the_left() -> None:
    """In the last layer the class token attends to patch 0, which attended to patch 5 in the first layer."""
    attention = np.broadcast_to(np.eye(14), (2, 1, 1, 14, 14)).copy()
    attention[1, 0, 0, 0] = np.eye(14)[2]
    attention[0, 0, 0, 2] = np.eye(14)[7]
    maps = feed(AttentionRollout(GRID), attention).compute().maps[0].ravel()
    assert maps[0] == maps[5] == 0.25
    assert maps.sum() == 0.5


# Properties


def test_every_image_is_computed_by_itself() -> None:
    attention = random_attention(GRID, layers=3, batch=5)
    together = feed(AttentionRollout(GRID, discard_ratio=0.5), attention).compute().maps
    for image in range(5):
        alone = feed(AttentionRollout(GRID, discard_ratio=0.5), attention[:, image : image + 1]).compute().maps
        np.testing.assert_allclose(together[image], alone[0], rtol=0, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(5)), tiling=tilings)
def test_the_order_of_images_is_that_of_the_maps(order: list[int], tiling: dict) -> None:
    attention = random_attention(GRID, batch=5)
    first = feed(AttentionRollout(GRID), attention).compute().maps
    second = feed(AttentionRollout(GRID), attention[:, order], **tiling).compute().maps
    np.testing.assert_allclose(second, first[order], rtol=0, atol=1e-7)


@given(order=st.permutations(range(3)))
def test_shards_append_in_the_order_of_merging(order: list[int]) -> None:
    attention = random_attention(GRID, batch=6)
    whole = feed(AttentionRollout(GRID), attention).compute().maps
    shards = [feed(AttentionRollout(GRID), attention[:, 2 * i : 2 * i + 2]) for i in order]
    merged = AttentionRollout(GRID)
    for shard in shards:
        merged.merge(shard)
    expected_maps = np.concatenate([whole[2 * i : 2 * i + 2] for i in order])
    np.testing.assert_allclose(merged.compute().maps, expected_maps, rtol=0, atol=1e-7)
    np.testing.assert_allclose(shards[0].compute().maps, expected_maps[:2], rtol=0, atol=1e-7)


@pytest.mark.parametrize("tile_bytes", [1, 600, 5000, 1 << 20])
def test_the_tile_size_changes_nothing(tile_bytes: int) -> None:
    model, x = small_vit(num_registers=1), images()
    grid = model.token_grid(24, 24)
    measure = AttentionRollout(grid, head_fusion="max", discard_ratio=0.3)
    with torch.no_grad(), attention_hooks(model, measure, tile_bytes=tile_bytes):
        model(x)
        model(x[:1])
    slow = expected(expected_attention(model, x), grid, "max", 0.3)
    np.testing.assert_allclose(measure.compute().maps, np.concatenate([slow, slow[:1]]), rtol=0, atol=1e-6)


def test_layers_of_different_heads_group_images_differently() -> None:
    """A tile holds as many images as fit, so a layer of one head has twice as many as a layer of two."""
    wide, narrow = (
        random_attention(GRID, layers=1, batch=4, heads=2),
        random_attention(GRID, layers=2, batch=4, heads=1, seed=1),
    )
    measure = AttentionRollout(GRID)
    feed(measure, wide, images=1)
    feed(_Only(measure, layer=1), narrow, images=3)
    fused = np.stack([wide[0].mean(1, keepdims=True), narrow[1]])
    np.testing.assert_allclose(measure.compute().maps, expected(fused, GRID), rtol=0, atol=1e-6)


class _Only:
    def __init__(self, measure: AttentionRollout, layer: int) -> None:
        self.measure, self.layer = measure, layer

    def update(self, tile) -> None:
        if tile.layer == self.layer:
            self.measure.update(tile)


class TwoLayers(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor) -> None:
        F.scaled_dot_product_attention(q, k, k)
        F.scaled_dot_product_attention(k, q, q)


def test_autocast_costs_no_precision() -> None:
    model, (q, k) = TwoLayers(), torch.randn(2, 3, 2, 14, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16), attention_hooks(model, measure := AttentionRollout(GRID)):
        model(q, k)
    np.testing.assert_allclose(measure.compute().maps, expected(expected_attention(model, q, k), GRID), rtol=0, atol=1e-6)


def test_gradients_may_flow_through_the_model() -> None:
    model, x = small_vit(), images()
    with attention_hooks(model, measure := AttentionRollout(model.token_grid(24, 24))):
        model(x).sum().backward()
    np.testing.assert_allclose(
        measure.compute().maps, expected(expected_attention(model, x), model.token_grid(24, 24)), rtol=0, atol=1e-6
    )


def test_non_square_images() -> None:
    model, x = small_vit(), images(16, 36)
    result = attention_rollout(model, x, device="cpu")
    grid = TokenGrid(2, 6, (8, 6), 1, True)
    assert result.maps.shape == (3, 2, 6)
    np.testing.assert_allclose(result.maps, expected(expected_attention(model, x), grid), rtol=0, atol=1e-6)


# The three algorithms


def use(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every rollout use this algorithm."""
    monkeypatch.setattr("vit_probe.measures.rollout.cheapest_algorithm", lambda inputs: algorithm)


class Layers(nn.Module):
    """Layers of attention with given queries and keys (layer, image, head, token, dim) and biases."""

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, biases: dict[int, torch.Tensor] | None = None) -> None:
        for layer, (query, key) in enumerate(zip(queries, keys, strict=True)):
            F.scaled_dot_product_attention(query, key, key, (biases or {}).get(layer))


def queries_and_keys(grid: TokenGrid, *, layers: int = 3, batch: int = 3, heads: int = 2, dim: int = 4) -> torch.Tensor:
    """(2, layer, image, head, token, dim)"""
    generator = torch.Generator().manual_seed(grid.num_tokens)
    return 1.5 * torch.randn(2, layers, batch, heads, grid.num_tokens, dim, generator=generator)


def literal(q: torch.Tensor, k: torch.Tensor, biases: dict[int, torch.Tensor] | None = None) -> np.ndarray:
    """(layer, image, head, query, key)"""
    scale = q.shape[-1] ** -0.5
    return np.stack([reference.softmax_attention(q[i], k[i], scale, (biases or {}).get(i)) for i in range(len(q))])


class WithoutTiles(AttentionRollout):
    """A rollout that fails if it is shown a tile."""

    def update(self, tile: Any) -> None:
        raise AssertionError("a tile was shown")


def inputs_of(heads: int, tokens: int, dim: int, *, biased: bool = False) -> AttentionInputs:
    query = torch.empty(1, heads, tokens, dim, device="meta")
    return AttentionInputs(0, "", query, query, query.new_empty(1, heads, tokens, tokens) if biased else None, dim**-0.5)


@pytest.mark.parametrize(
    ("heads", "tokens", "algorithm"),
    [
        (6, 197, "product"),  # ViT-S/16
        (6, 288, "product"),
        (6, 289, "maps"),
        (6, 785, "maps"),
        (6, 1370, "maps"),
        (6, 1536, "maps"),
        (6, 1537, "recomputed"),
        (6, 4097, "recomputed"),
        (12, 197, "product"),  # ViT-B/16
        (12, 577, "maps"),
        (12, 4097, "recomputed"),
    ],
)
def test_the_cheapest_algorithm_by_size(heads: int, tokens: int, algorithm: Algorithm) -> None:
    assert cheapest_algorithm(inputs_of(heads, tokens, 64)) == algorithm
    assert cheapest_algorithm(inputs_of(heads, tokens, 64, biased=True)) == ("maps" if algorithm == "recomputed" else algorithm)


@pytest.mark.parametrize("grid", [GRID, BARE, TokenGrid(3, 4, (8, 6), 0, False)], ids=["class token", "register", "bare"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_batches_one_after_the_other(algorithm: Algorithm, grid: TokenGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    use(algorithm, monkeypatch)
    q, k = queries_and_keys(grid)
    slow = expected(literal(q, k), grid)
    with attention_hooks(model := Layers(), measure := AttentionRollout(grid), tile_bytes=900):
        for images in (slice(0, 2), slice(2, 3), slice(0, 3)):
            model(q[:, images], k[:, images])
    np.testing.assert_allclose(measure.compute().maps, np.concatenate([slow, slow]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("biased", [(1,), (0, 2), (0, 1, 2)])
def test_layers_with_a_bias_are_never_recomputed(
    algorithm: Algorithm, biased: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask may hide all keys from a query, so rows of A need not sum to 1 before they are divided by their sum."""
    use(algorithm, monkeypatch)
    q, k = queries_and_keys(GRID)
    shut = torch.rand(3, 2, 14, 14, generator=torch.Generator().manual_seed(0)) > 0.7
    shut[:, :, 3] = True
    biases = {layer: torch.zeros(shut.shape).masked_fill(shut, -torch.inf) for layer in biased}
    with attention_hooks(model := Layers(), measure := AttentionRollout(GRID), tile_bytes=900):
        model(q, k, biases)
    with np.errstate(invalid="ignore"):
        attention = np.nan_to_num(literal(q, k, biases))
    np.testing.assert_allclose(measure.compute().maps, expected(attention, GRID), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("fusion", "ratio"), [("mean", 0.0), ("max", 0.0), ("min", 0.3), ("mean", 0.9)])
@pytest.mark.parametrize("tile_bytes", [1, 60, 500, 1500, 1 << 20])
def test_tiles_of_any_size_are_recomputed(fusion: str, ratio: float, tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use("recomputed", monkeypatch)
    monkeypatch.setattr(rollout_algorithms, "TILE_BYTES", tile_bytes)
    q, k = queries_and_keys(GRID, batch=2, heads=3)
    measure = WithoutTiles(GRID, head_fusion=fusion, discard_ratio=ratio)
    with attention_hooks(model := Layers(), measure):
        model(q, k)
    np.testing.assert_allclose(measure.compute().maps, expected(literal(q, k), GRID, fusion, ratio), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("grid", "asked"), [(GRID, [1, 14, 14]), (BARE, [12, 13, 13])])
def test_only_the_rows_that_are_read_of_the_last_layer_are_recomputed(
    grid: TokenGrid, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries: list[int] = []

    class Recording(TiledAttention):
        def __call__(self, inputs: AttentionInputs, *others: Any) -> Any:
            queries.append(inputs.query.shape[-2])
            return super().__call__(inputs, *others)

    use("recomputed", monkeypatch)
    monkeypatch.setattr(rollout_algorithms, "TiledAttention", Recording)
    q, k = queries_and_keys(grid, batch=2)
    with attention_hooks(model := Layers(), measure := WithoutTiles(grid)):
        model(q, k)
    assert not queries  # nothing during the forward pass
    measure.compute()
    assert queries == asked * 2


@pytest.mark.parametrize(("fusion", "matrices"), [("mean", 1 / 4), ("max", 1)])
def test_recomputing_holds_queries_and_keys_only(fusion: str, matrices: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_algorithms, "TILE_BYTES", 1 << 16)
    grid = TokenGrid(16, 32, (4, 4), 0, False)
    q, k = (tensor.clone() for tensor in queries_and_keys(grid, batch=2))
    measure = WithoutTiles(grid, head_fusion=fusion)
    with attention_hooks(model := Layers(), measure), Largest() as largest:
        model(q, k)
        assert largest.nbytes <= q.nbytes < 512 * 512 * 4 / 8
        result = measure.compute()
    assert result.algorithm == "recomputed"  # by itself
    assert largest.nbytes <= matrices * 512 * 512 * 4


def test_kept_queries_and_keys_are_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models may write to their queries and keys afterwards."""
    use("recomputed", monkeypatch)
    q, k = queries_and_keys(GRID)
    slow = expected(literal(q, k), GRID)
    with attention_hooks(model := Layers(), measure := AttentionRollout(GRID)):
        model(q, k)
    for tensor in (q, k):
        tensor.zero_()
    np.testing.assert_allclose(measure.compute().maps, slow, rtol=0, atol=1e-6)


def test_four_thousand_tokens() -> None:
    grid = TokenGrid(64, 64, (4, 4), 1, True)
    q, k = queries_and_keys(grid, layers=2, batch=1, heads=1, dim=8)
    measure = WithoutTiles(grid)
    with attention_hooks(model := Layers(), measure):
        model(q, k)
    # A A = (F1 + I) / 2 (F0 + I) / 2, of which the class token's row is a vector times a matrix.
    first, second = (torch.softmax(8**-0.5 * q[layer, 0, 0].double() @ k[layer, 0, 0].double().mT, dim=-1) for layer in (0, 1))
    row = (second[0] + torch.eye(1, 4097, dtype=torch.float64)[0]) / 2
    row = (row @ first + row) / 2
    result = measure.compute()
    assert result.algorithm == "recomputed"
    np.testing.assert_allclose(result.maps.ravel(), row[1:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_result_names_the_algorithm(algorithm: Algorithm, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(algorithm, monkeypatch)
    model = small_vit()
    result = attention_rollout(model, images(), device="cpu")
    assert result.algorithm == algorithm
    again = load_result(result.save(tmp_path / "rollout.safetensors"))
    assert again.algorithm == algorithm
    grid = model.token_grid(24, 24)
    with torch.no_grad(), attention_hooks(model, measure := AttentionRollout(grid)):
        model(images())
    restored, merged = AttentionRollout(grid), AttentionRollout(grid)
    restored.restore(measure.state())
    merged.merge(measure)
    measure.merge(AttentionRollout(grid))
    for other in (restored, merged, measure):
        assert other.compute().algorithm == algorithm
        np.testing.assert_array_equal(other.compute().maps, result.maps)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_shards_of_any_algorithm_are_put_in_order(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    use(algorithm, monkeypatch)
    q, k = queries_and_keys(GRID)
    shards = [AttentionRollout(GRID), AttentionRollout(GRID)]
    for shard, shown in zip(shards, ([2], [0, 1]), strict=True):
        with attention_hooks(model := Layers(), shard):
            model(q[:, shown], k[:, shown])
    shards[0].merge(shards[1])
    shards[0].reorder([1, 2, 0])
    np.testing.assert_allclose(shards[0].compute().maps, expected(literal(q, k), GRID), rtol=0, atol=1e-6)


class BreaksOff:
    """Passes some layers on to a rollout, then raises."""

    def __init__(self, measure: AttentionRollout, layers: int) -> None:
        self.measure, self.layers = measure, layers

    def begin_layer(self, inputs: AttentionInputs) -> bool:
        if inputs.layer == self.layers:
            raise RuntimeError("interrupted")
        return self.measure.begin_layer(inputs)

    def update(self, tile: Any) -> None:
        self.measure.update(tile)


@pytest.mark.parametrize("rolled_back", [True, False])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_interrupted_pass_in_every_algorithm(
    algorithm: Algorithm, rolled_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(algorithm, monkeypatch)
    model, measure, (q, k) = Layers(), AttentionRollout(GRID), queries_and_keys(GRID)
    for failing in (True, False):
        measure.begin_batch()
        with suppress(RuntimeError), attention_hooks(model, BreaksOff(measure, layers=2 if failing else 3)):
            model(q, k)
        if failing and rolled_back:
            measure.roll_back()
    if rolled_back:
        np.testing.assert_allclose(measure.compute().maps, expected(literal(q, k), GRID), rtol=0, atol=1e-6)
    else:
        with pytest.raises(InputError, match="images went through different numbers of layers: 2, 3"):
            measure.compute()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_half_precision_and_autocast_in_every_algorithm(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the model's queries and keys are rounded, nothing computed from them; `compute` may be called under autocast."""
    use(algorithm, monkeypatch)
    q, k = queries_and_keys(GRID).bfloat16()
    for cast in (True, False):
        measure = AttentionRollout(GRID)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            with attention_hooks(model := Layers(), measure):
                model(q.float() if cast else q, k.float() if cast else k)
            maps = measure.compute().maps
        assert maps.dtype == np.float32
        np.testing.assert_allclose(maps, expected(literal(q.float(), k.float()), GRID), rtol=0, atol=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients_and_inference_mode_in_every_algorithm(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    use(algorithm, monkeypatch)
    model, x = small_vit(), images()
    grid = model.token_grid(24, 24)
    slow = expected(expected_attention(model, x), grid)
    with attention_hooks(model, measure := AttentionRollout(grid)):
        model(x).sum().backward()
        with torch.inference_mode():
            model(x)
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    np.testing.assert_allclose(measure.compute().maps, np.concatenate([slow, slow]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_beside_an_observer_that_wants_tiles(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    use(algorithm, monkeypatch)
    q, k = queries_and_keys(GRID)
    with attention_hooks(model := Layers(), measure := AttentionRollout(GRID), seen := Assemble(), tile_bytes=900):
        model(q, k)
    np.testing.assert_allclose(seen.attention(), literal(q, k), rtol=0, atol=1e-6)
    np.testing.assert_allclose(measure.compute().maps, expected(literal(q, k), GRID), rtol=0, atol=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_other_tokens_than_the_grids_in_every_algorithm(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    use(algorithm, monkeypatch)
    with pytest.raises(InputError, match=r"attention covers 13 tokens, but TokenGrid.*accounts for 14"):  # noqa: SIM117
        with attention_hooks(model := Layers(), AttentionRollout(GRID)):
            model(*queries_and_keys(BARE))


# The result


@pytest.fixture(scope="module")
def result() -> AttentionRolloutResult:
    model = small_vit()
    model.preprocessing = Preprocessing(size=(24, 24), resize=24)
    return attention_rollout(model, images(), discard_ratio=0.25, device="cpu")


def test_dataframe_has_one_row_per_image_and_patch(result: AttentionRolloutResult) -> None:
    frame = result.to_dataframe()
    assert list(frame) == ["image", "name", "row", "col", "rollout"]
    assert len(frame) == 3 * 3 * 4
    assert list(frame.name.unique()) == ["image 0", "image 1", "image 2"]
    for image, row, col in ((0, 0, 0), (1, 2, 3), (2, 1, 0)):
        match = frame[(frame.image == image) & (frame.row == row) & (frame.col == col)]
        assert match.rollout.tolist() == [result.maps[image, row, col]]


def test_summary_names_the_peak(result: AttentionRolloutResult) -> None:
    summary = result.summary()
    np.testing.assert_allclose(summary["on patches"], result.maps.sum(axis=(1, 2)))
    for image, (row, col) in enumerate(zip(summary["peak row"], summary["peak col"], strict=True)):
        assert result.maps[image, row, col] == result.maps[image].max()


def test_images_are_kept_for_display(result: AttentionRolloutResult) -> None:
    assert result.images is not None
    assert (result.images.shape, result.images.dtype) == ((3, 24, 24, 3), np.uint8)
    assert attention_rollout(small_vit(), images(), device="cpu").images is None


@pytest.mark.parametrize("kind", ["pairs", "heatmap"])
def test_plot_returns_axes(result: AttentionRolloutResult, kind: str) -> None:
    assert isinstance(result.plot(kind=kind), Axes)


@pytest.mark.parametrize("keep", [True, False])
def test_saved_and_read_back(result: AttentionRolloutResult, tmp_path, keep: bool) -> None:
    result = result if keep else replace(result, images=None)
    again = load_result(result.save(tmp_path / "rollout.safetensors"))
    assert isinstance(again, AttentionRolloutResult)
    np.testing.assert_array_equal(again.maps, result.maps)
    assert (again.images is None) is not keep
    if keep:
        np.testing.assert_array_equal(again.images, result.images)
    assert again.provenance == result.provenance
    assert again.provenance["options"] == {"head_fusion": "mean", "discard_ratio": 0.25}
    assert again.names == result.names
    assert (again.head_fusion, again.discard_ratio) == ("mean", 0.25)


# Errors


def test_an_unknown_fusion() -> None:
    with pytest.raises(InputError, match="head_fusion must be one of mean, max, min; got 'sum'"):
        attention_rollout(small_vit(), images(), head_fusion="sum", device="cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_an_impossible_discard_ratio(ratio: float) -> None:
    with pytest.raises(InputError, match=r"discard_ratio must lie in \[0, 1\)"):
        attention_rollout(small_vit(), images(), discard_ratio=ratio, device="cpu")


def test_a_grid_that_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"makes 13 tokens of images of 24 x 24 pixels.*TokenGrid.*accounts for 14; pass"):
        attention_rollout(small_vit(), images(), grid=GRID, device="cpu")


def test_nothing_measured() -> None:
    with pytest.raises(InputError, match="no attention has been measured yet"):
        AttentionRollout(GRID).compute()


@pytest.mark.parametrize(
    "other",
    [
        AttentionRollout(BARE),
        AttentionRollout(GRID, head_fusion="max"),
        AttentionRollout(GRID, discard_ratio=0.5),
    ],
)
def test_shards_that_do_not_belong_together(other: AttentionRollout) -> None:
    with pytest.raises(InputError, match="cannot merge rollouts"):
        AttentionRollout(GRID).merge(other)


@pytest.mark.parametrize(("tiles", "layers"), [(2, "1, 3"), (4, "1, 2, 3"), (8, "2, 3")])
def test_an_interrupted_batch_makes_no_map(tiles: int, layers: str) -> None:
    attention = random_attention(GRID, layers=3)
    measure = feed(AttentionRollout(GRID), attention)
    with pytest.raises(RuntimeError, match="interrupted"):
        feed(FailsAfter(measure, tiles=tiles), attention, images=1)
    feed(measure, attention)
    with pytest.raises(InputError, match=f"different numbers of layers: {layers}"):
        measure.compute()


def test_shards_of_models_of_another_depth() -> None:
    shallow, deep = (feed(AttentionRollout(GRID), random_attention(GRID, layers=layers)) for layers in (2, 3))
    shallow.merge(deep)
    with pytest.raises(InputError, match="different numbers of layers"):
        shallow.compute()


def test_a_batch_is_not_lost_where_its_rows_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vit_probe.measures.rollout.cheapest_algorithm", lambda inputs: "maps")
    measure = AttentionRollout(TokenGrid(3, 4, (8, 8), 1, True))
    with torch.no_grad(), attention_hooks(model := small_vit(), measure):
        model(images())
    with monkeypatch.context() as failing:
        failing.setattr("vit_probe.measures.rollout_algorithms.RightToLeft.rows", lambda self, weights: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            measure.compute()
    assert len(measure.compute().maps) == 3
