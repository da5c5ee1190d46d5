"""Mean attention distance: the literal reference, closed forms and invariances."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes

from tests import reference
from tests.example_models import FAMILIES, expected_attention, images, small_vit, swin
from tests.measures.tiles import (
    FailsAfter,
    feed,
    grids,
    identity_attention,
    merged_shards,
    random_attention,
    tilings,
    uniform_attention,
)
from vit_probe import InputError, TokenGrid, attention_hooks, load_result, mean_attention_distance
from vit_probe.measures.base.offset_measure import OffsetMeasure
from vit_probe.measures.base.per_head import HeadResult
from vit_probe.runner.run import AttentionRun
from vit_probe.tokens.locate import locate_tokens

GRID = TokenGrid(3, 4, (8, 6), 2, True)
PREFIXES = ["renormalize", "drop"]
observer = mean_attention_distance.observer


def expected(attention: np.ndarray, grid: TokenGrid, prefix: str) -> reference.AttentionDistance:
    return reference.mean_attention_distance(
        attention, grid.rows, grid.cols, grid.patch_size, grid.num_prefix_tokens, prefix, ddof=1
    )


def agrees(result: HeadResult, attention: np.ndarray, grid: TokenGrid, prefix: str, rtol: float = 1e-5) -> None:
    slow = expected(attention, grid, prefix)
    scale = max(grid.uniform_distance(), 1e-6)
    np.testing.assert_allclose(result.distance, slow.mean, rtol=0, atol=rtol * scale)
    np.testing.assert_allclose(result.std["distance"], slow.std, rtol=0, atol=rtol * scale)
    np.testing.assert_allclose(result.patch_mass, slow.patch_mass, rtol=0, atol=rtol)


def same(one: HeadResult, other: HeadResult, *, rtol: float = 0, atol: float = 0) -> None:
    """Compare all values of two results, and their spread over images."""
    for mine, theirs in ((one.values, other.values), (one.std, other.std), (one.confidence, other.confidence)):
        assert list(mine) == list(theirs)
        assert list(mine)[:2] == ["distance", "patch_mass"]
        for name, values in theirs.items():
            np.testing.assert_allclose(mine[name], values, rtol=rtol, atol=atol, err_msg=name)


# Against the reference


@pytest.mark.parametrize("prefix", PREFIXES)
@settings(max_examples=30, deadline=None)
@given(grid=grids, batch=st.integers(1, 4), tiling=tilings, seed=st.integers(0, 99))
def test_random_attention_in_any_tiles(prefix: str, grid: TokenGrid, batch: int, tiling: dict, seed: int) -> None:
    attention = random_attention(grid, batch=batch, seed=seed)
    result = feed(observer(grid, prefix=prefix), attention, **tiling).compute()
    agrees(result, attention, grid, prefix)
    assert (result.num_images, result.options["prefix"]) == (batch, prefix)
    assert result.modules == ["blocks.0.attn", "blocks.1.attn"]
    assert result.num_windows.tolist() == [1, 1]
    uniform = reference.uniform_distance(grid.rows, grid.cols, grid.patch_size)
    np.testing.assert_allclose(result.uniform_distance, [uniform, uniform])


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_every_family(name: str, prefix: str) -> None:
    family = FAMILIES[name]
    model, x = family.model(), family.images()
    attention = expected_attention(model, x)
    result = mean_attention_distance(model, x, prefix=prefix, batch_size=2, device="cpu")
    agrees(result, attention, family.grid, prefix)
    assert result.distance.std() > 0.02  # else the comparison would be empty


@pytest.mark.parametrize("tiling", [dict(), dict(rows=1), dict(rows=5, heads=1), dict(images=2, rows=9), dict(batch_size=2)])
def test_distances_of_a_large_grid(tiling: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a large grid, distances are made for the queries of each tile, in memory that is used again."""
    monkeypatch.setattr("vit_probe.measures.base.reduce._KEPT_PAIRS", 0)
    attention = random_attention(GRID, heads=3)
    measure = observer(GRID)
    for _ in range(2):
        feed(measure, attention, **tiling)
        feed(measure, attention, **tiling, dtype=torch.float64)
    agrees(measure.compute(), np.concatenate([attention] * 4, axis=1), GRID, "renormalize")


def test_the_two_modes_differ_only_where_there_are_prefix_tokens() -> None:
    attention = random_attention(GRID)
    renormalized, dropped = (feed(observer(GRID, prefix=prefix), attention).compute() for prefix in PREFIXES)
    assert (renormalized.distance > dropped.distance + 0.5).all()
    bare = TokenGrid(3, 4, (8, 6), 0, False)
    attention = random_attention(bare)
    renormalized, dropped = (feed(observer(bare, prefix=prefix), attention).compute() for prefix in PREFIXES)
    np.testing.assert_allclose(renormalized.distance, dropped.distance, rtol=1e-6)


# Closed forms


@pytest.mark.parametrize("prefix", PREFIXES)
def test_identity_attention_has_distance_zero(prefix: str) -> None:
    result = feed(observer(GRID, prefix=prefix), identity_attention(GRID)).compute()
    assert (result.distance == 0).all()
    assert (result.std["distance"] == 0).all()
    assert (result.patch_mass == 1).all()


def test_uniform_attention_has_the_grids_uniform_distance() -> None:
    renormalized, dropped = (feed(observer(GRID, prefix=p), uniform_attention(GRID)).compute() for p in PREFIXES)
    np.testing.assert_allclose(renormalized.distance, GRID.uniform_distance(), rtol=1e-6)
    np.testing.assert_allclose(dropped.distance, GRID.uniform_distance() * 12 / 14, rtol=1e-6)
    np.testing.assert_allclose(renormalized.patch_mass, 12 / 14, rtol=1e-6)
    for result in (renormalized, dropped):
        assert result.uniform_distance.tolist() == [GRID.uniform_distance()] * 2


@pytest.mark.parametrize("left", [0.0, 1e-45, 1e-38])
def test_all_attention_on_the_class_token(left: float) -> None:
    """What rounds to 0 cannot be rescaled; unscaled it is a distance of 0."""
    attention = np.full((1, 2, 2, 14, 14), left)
    attention[..., 0] = 1
    rescaled, dropped = (feed(observer(GRID, prefix=prefix), attention).compute() for prefix in PREFIXES)
    assert np.isnan(rescaled.distance).all()
    assert (rescaled.excluded == 1).all()
    assert (rescaled.patch_mass < 1e-36).all()
    assert (dropped.distance < 1e-34).all()


def test_a_small_mass_is_rescaled_in_full() -> None:
    attention = np.full((1, 2, 2, 14, 14), 1e-30)
    attention[..., 0] = 1
    result = feed(observer(GRID), attention).compute()
    np.testing.assert_allclose(result.distance, GRID.uniform_distance(), rtol=1e-5)


def test_prefix_tokens_are_not_queries() -> None:
    attention = random_attention(GRID)
    other = attention.copy()
    other[..., :2, :] = 1 / 14
    first, second = (feed(observer(GRID), a).compute() for a in (attention, other))
    np.testing.assert_array_equal(first.distance, second.distance)


def test_the_spread_does_not_cancel() -> None:
    """Of images that differ by a millionth, the difference of a sum of squares and a squared sum would be rounding."""
    attention = np.repeat(random_attention(GRID, batch=1), 6, axis=1)
    attention[:, :, :, 2:, 0] += np.linspace(0, 1e-6, 6)[:, None, None]
    result = feed(observer(GRID), attention, batch_size=2, dtype=torch.float64).compute()
    slow = expected(attention, GRID, "drop")
    mass = feed(observer(GRID, prefix="drop"), attention, batch_size=4, dtype=torch.float64).compute()
    np.testing.assert_allclose(mass.std["distance"], slow.std, atol=1e-9)
    np.testing.assert_allclose(result.std["distance"], expected(attention, GRID, "renormalize").std, atol=1e-9)
    noisy = attention + np.linspace(0, 1e-6, 6)[:, None, None, None] * np.arange(14)
    result = feed(observer(GRID), noisy, batch_size=2, dtype=torch.float64).compute()
    np.testing.assert_allclose(result.std["distance"], expected(noisy, GRID, "renormalize").std, rtol=1e-3)
    assert (result.std["distance"] > 1e-8).all()


# Properties


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(5)), tiling=tilings)
def test_the_order_of_images_and_the_batches_change_nothing(order: list[int], tiling: dict) -> None:
    attention = random_attention(GRID, batch=5)
    first = feed(observer(GRID), attention).compute()
    second = feed(observer(GRID), attention[:, order], **tiling).compute()
    same(second, first, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(4)), cuts=st.lists(st.integers(0, 6), min_size=3, max_size=3).map(sorted))
def test_shards_merge_in_any_order(order: list[int], cuts: list[int]) -> None:
    attention = random_attention(GRID, batch=6)
    whole = feed(observer(GRID), attention).compute()
    merged = merged_shards(lambda: observer(GRID), attention, order, cuts).compute()
    assert merged.num_images == 6
    same(merged, whole, rtol=1e-6)


def test_a_merged_shard_is_left_as_it_was() -> None:
    one, other = (feed(observer(GRID), random_attention(GRID, seed=seed)) for seed in (1, 2))
    before = other.compute()
    one.merge(other)
    feed(one, random_attention(GRID, seed=3))
    np.testing.assert_array_equal(other.compute().distance, before.distance)
    assert other.compute().num_images == 3


@pytest.mark.parametrize("tile_bytes", [1, 600, 5000, 1 << 20])
def test_the_tile_size_changes_nothing(tile_bytes: int) -> None:
    model, x = small_vit(num_registers=1), images()
    grid = model.token_grid(24, 24)
    with torch.no_grad(), attention_hooks(model, measure := observer(grid), tile_bytes=tile_bytes):
        model(x)
    agrees(measure.compute(), expected_attention(model, x), grid, "renormalize")


def test_one_image_has_no_spread() -> None:
    result = mean_attention_distance(small_vit(), images(batch=1), device="cpu")
    assert result.num_images == 1
    assert np.isnan(result.std["distance"]).all()
    assert np.isfinite(result.distance).all()


def test_an_interrupted_image_does_not_count() -> None:
    attention = random_attention(GRID)
    measure = feed(observer(GRID), attention)
    before = measure.compute()
    with pytest.raises(RuntimeError):
        feed(FailsAfter(measure, tiles=1), attention, rows=5)
    after = measure.compute()
    np.testing.assert_array_equal(after.distance, before.distance)
    agrees(feed(measure, attention).compute(), np.concatenate([attention, attention], axis=1), GRID, "renormalize")


def test_non_square_images_and_another_resolution() -> None:
    model, x = small_vit(), images(16, 36)
    result = mean_attention_distance(model, x, device="cpu")
    grid = TokenGrid(2, 6, (8, 6), 1, True)
    agrees(result, expected_attention(model, x), grid, "renormalize")
    assert result.provenance["grid"]["cols"] == 6


# The result


@pytest.fixture(scope="module")
def result() -> HeadResult:
    return mean_attention_distance(small_vit(depth=3), images(), device="cpu")


def test_dataframe_has_one_row_per_head(result: HeadResult) -> None:
    frame = result.to_dataframe()
    measured = ["distance", "std", "confidence", "patch_mass", "uniform_distance", "num_windows", "num_images"]
    assert list(frame) == ["layer", "module", "head", *measured]
    assert frame.module.tolist() == [f"blocks.{layer}.attn" for layer in (0, 0, 1, 1, 2, 2)]
    assert frame[["layer", "head"]].to_numpy().tolist() == [[layer, head] for layer in range(3) for head in range(2)]
    row = frame[(frame.layer == 2) & (frame["head"] == 1)].iloc[0]
    expected_row = result.distance[2, 1], result.std["distance"][2, 1], result.patch_mass[2, 1]
    assert (row.distance, row["std"], row.patch_mass) == expected_row
    assert row["confidence"] == result.confidence["distance"][2, 1]
    assert set(frame.uniform_distance) == set(result.uniform_distance)
    assert set(frame.num_images) == {3}


def test_summary_has_one_row_per_layer(result: HeadResult) -> None:
    summary = result.summary()
    np.testing.assert_allclose(summary["mean distance (pixels)"], result.distance.mean(1))
    np.testing.assert_allclose(summary["lowest head"], result.distance.min(1))
    np.testing.assert_allclose(summary["highest head"], result.distance.max(1))
    np.testing.assert_allclose(summary["patch mass"], result.patch_mass.mean(1))


def test_plot_returns_axes(result: HeadResult) -> None:
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    assert result.plot(ax=ax, spread=True) is ax
    assert isinstance(result.plot(), Axes)


def test_saved_and_read_back(result: HeadResult, tmp_path) -> None:
    again = load_result(result.save(tmp_path / "distance.safetensors"))
    assert isinstance(again, HeadResult)
    same(again, result)
    for name in ("distance", "patch_mass", "uniform_distance", "num_windows"):
        np.testing.assert_array_equal(getattr(again, name), getattr(result, name))
    assert (again.modules, again.num_images, again.options) == (result.modules, 3, {"prefix": "renormalize"})
    assert again.provenance == result.provenance
    assert again.provenance["options"] == {"prefix": "renormalize"}
    assert again.to_dataframe().equals(result.to_dataframe())


# Errors


def test_an_unknown_prefix() -> None:
    with pytest.raises(InputError, match="prefix must be one of renormalize, drop; got 'keep'"):
        mean_attention_distance(small_vit(), images(), prefix="keep", device="cpu")  # type: ignore[arg-type]


def test_a_grid_that_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"makes 13 tokens of images of 24 x 24 pixels.*TokenGrid.*accounts for 14; pass"):
        mean_attention_distance(small_vit(), images(), grid=GRID, device="cpu")
    with pytest.raises(InputError, match=r"attention covers 13 tokens, but TokenGrid.*accounts for 14; pass the grid"):
        feed(observer(GRID), random_attention(TokenGrid(3, 4, (8, 6), 1, True)))


def test_a_grid_of_other_images() -> None:
    with pytest.raises(InputError, match=r"make 3 x 4 patches, which TokenGrid\(rows=1, cols=6.* does not fit"):
        mean_attention_distance(small_vit(), images(), grid=TokenGrid(1, 6, GRID.patch_size, 1, True), device="cpu")


def test_attention_that_is_not_finite() -> None:
    with pytest.raises(InputError, match="values of attention_distance are not all finite"):
        mean_attention_distance(small_vit(), images() * 1e37, device="cpu")


def test_nothing_measured() -> None:
    with pytest.raises(InputError, match="no values of attention_distance have been measured yet"):
        observer(GRID).compute()


@pytest.mark.parametrize(
    "other",
    [
        feed(observer(GRID, prefix="drop"), random_attention(GRID)),
        feed(observer(replace(GRID, patch_size=(8, 8))), random_attention(GRID)),
        feed(observer(GRID), random_attention(GRID, layers=3)),
        feed(observer(GRID), random_attention(GRID, heads=1)),
        observer(GRID, prefix="drop"),
    ],
)
def test_shards_that_do_not_belong_together(other: OffsetMeasure) -> None:
    measure = feed(observer(GRID), random_attention(GRID))
    before = measure.compute()
    with pytest.raises(InputError, match="cannot merge values of attention_distance"):
        measure.merge(other)
    np.testing.assert_array_equal(measure.compute().distance, before.distance)
    empty = observer(replace(GRID, num_prefix_tokens=3))
    with pytest.raises(InputError, match="cannot merge values of attention_distance"):
        empty.merge(measure)
    with pytest.raises(InputError, match="no values of attention_distance"):
        empty.compute()


def test_layers_of_different_heads() -> None:
    measure = observer(GRID)
    attention = [random_attention(GRID, layers=layer + 1, heads=heads) for layer, heads in enumerate((2, 3))]
    for layer, shown in enumerate(attention):
        feed(_Only(measure, layer), shown)
    result = measure.compute()
    assert np.isnan(result.distance[0, 2])
    frame = result.to_dataframe()
    assert frame[["layer", "head"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]]
    slow = [expected(attention[layer][layer:], GRID, "renormalize").mean[0] for layer in (0, 1)]
    np.testing.assert_allclose(frame.distance, np.concatenate(slow), rtol=1e-5)
    np.testing.assert_allclose(result.summary()["mean distance (pixels)"], [row.mean() for row in slow], rtol=1e-5)


def test_layers_of_different_images_make_no_table() -> None:
    measure = observer(GRID)
    for layer, batch in enumerate((2, 3)):
        feed(_Only(measure, layer), random_attention(GRID, layers=layer + 1, batch=batch))
    with pytest.raises(InputError, match=r"the layers have seen different numbers of images \(2, 3\)"):
        measure.compute()


class _Only:
    def __init__(self, measure: OffsetMeasure, layer: int) -> None:
        self.measure, self.layer = measure, layer

    def update(self, tile) -> None:
        if tile.layer == self.layer:
            self.measure.update(tile)


# Windows


def test_parts_of_windowed_images_are_merged() -> None:
    model, x = swin(), images(48, 48, batch=5)
    whole = mean_attention_distance(model, x, batch_size=5, device="cpu")
    found = locate_tokens(model, 48, 48)
    measures = []
    for part in (x[:2], x[2:]):
        measure = observer(found.grid, windows=found.windows)
        AttentionRun(model, part, batch_size=1, device="cpu").observe(measure)
        measures.append(measure)
    measures[0].merge(measures[1])
    result = measures[0].compute()
    assert result.num_images == 5
    assert result.num_windows.tolist() == [16, 16, 4, 4]
    same(result, whole, rtol=1e-5, atol=1e-6)
    other = observer(found.grid)
    with pytest.raises(InputError, match="cannot merge values of attention_distance within other windows"):
        other.merge(measures[0])


@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_an_interrupted_pass_over_windows_leaves_nothing(tiles: int) -> None:
    model, x = swin(), images(48, 48, batch=3)
    found = locate_tokens(model, 48, 48)
    measure = observer(found.grid, windows=found.windows)
    with pytest.raises(RuntimeError, match="interrupted"), torch.no_grad():  # noqa: SIM117
        with attention_hooks(model, FailsAfter(measure, tiles), tile_bytes=2000):
            model(x[:1])
    before = image_counts(measure)  # an image that was complete in a layer has counted there
    with torch.no_grad(), attention_hooks(model, measure, tile_bytes=2000):
        model(x)
    assert image_counts(measure)[len(before) :] == [3] * (4 - len(before))
    assert image_counts(measure)[: len(before)] == [count + 3 for count in before]


def image_counts(measure: OffsetMeasure) -> list[int]:
    """The number of images that each layer has seen."""
    state = measure.state()
    layers = [set(state[f"{layer}.patch_mass.count"].tolist()) for layer in range(len(state["modules"]))]
    assert all(len(counts) == 1 for counts in layers)
    return [counts.pop() for counts in layers]
