"""head_measure: what its functions are given and may return, and what they may not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests.example_models import images, small_vit, swin
from tests.measures.tiles import feed, random_attention, tilings
from vit_probe import InputError, PatchAttention, TokenGrid, attention_hooks, head_measure
from vit_probe.measures.base.reduce import QuerySum, ReceivedAttention
from vit_probe.tokens.grid import Windows

pytestmark = pytest.mark.usefixtures("own_registry")

GRID = TokenGrid(3, 4, (8, 6), 2, True)
WINDOWS = Windows(TokenGrid(2, 3, (8, 4), 0, False), torch.tensor([[0, 1, 3, 4], [2, -1, 5, -1]]))


def declared(function: Any, **options: Any) -> Any:
    return head_measure(**({"unit": "share", "reference": "a test", "name": "tested"} | options))(function)


def looked_at(attention: np.ndarray, *, windows: Windows | None = None, **tiling: Any) -> list[PatchAttention]:
    """What a function is given, tile by tile; copied, since the memory is used again."""
    seen: list[PatchAttention] = []

    def look(attention: PatchAttention) -> dict[str, Tensor]:
        for name in ("to_patches", "to_prefix", "to_self", "dx", "dy"):
            seen_value = getattr(attention, name).clone()
            object.__setattr__(attention, f"seen_{name}", seen_value)
        seen.append(attention)
        return {"tested": attention.to_self}

    grid = windows.grid if windows else GRID
    feed(declared(look).observer(grid, windows={0: windows} if windows else None), attention, **tiling)
    return seen


# What a function is given


@pytest.mark.parametrize("tiling", [{}, {"rows": 1}, {"rows": 5, "heads": 1}, {"images": 1, "rows": 3}])
def test_the_attention_of_patch_queries(tiling: dict[str, int]) -> None:
    weights = random_attention(GRID, layers=1, batch=2, heads=3)
    seen: Any = looked_at(weights, **tiling)
    found = {name: np.zeros((2, 3, 12, length)) for name, length in (("to_patches", 12), ("to_prefix", 2))}
    assert all(one.query_index.start >= 2 for one in seen)
    assert sum(len(one.seen_to_self) * one.seen_to_self.shape[1] * one.seen_to_self.shape[2] for one in seen) == 2 * 3 * 12
    if not tiling:
        (one,) = seen
        np.testing.assert_allclose(one.seen_to_patches, weights[0, :, :, 2:, 2:], rtol=1e-6)
        np.testing.assert_allclose(one.seen_to_prefix, weights[0, :, :, 2:, :2], rtol=1e-6)
        assert found["to_patches"].shape == one.seen_to_patches.shape
    for one in seen:
        queries = np.arange(one.query_index.start, one.query_index.stop) - 2
        keys = np.arange(12)
        np.testing.assert_allclose(one.seen_dx, 6 * (keys % 4 - (queries % 4)[:, None]), atol=1e-5)
        np.testing.assert_allclose(one.seen_dy, 8 * (keys // 4 - (queries // 4)[:, None]), atol=1e-5)
        total = one.seen_to_patches.sum(-1) + one.seen_to_prefix.sum(-1)
        np.testing.assert_allclose(total, 1, rtol=1e-5)
        for position, query in enumerate(queries):
            np.testing.assert_array_equal(one.seen_to_self[:, :, position], one.seen_to_patches[:, :, position, query])
        assert one.grid == GRID
        assert one.patch_index is None


def test_the_attention_within_windows() -> None:
    weights = random_attention(TokenGrid(2, 2, (8, 4), 0, False), layers=1, batch=4)
    (one,) = looked_at(weights, windows=WINDOWS)
    seen: Any = one
    assert seen.patch_index.tolist() == [[0, 1, 3, 4], [2, -1, 5, -1]] * 2
    padding = np.array([[False] * 4, [False, True, False, True]] * 2)[:, None, None]
    np.testing.assert_allclose(seen.seen_to_patches, np.where(padding, 0, weights[0]), rtol=1e-6)
    np.testing.assert_allclose(seen.seen_to_prefix[..., 0], np.where(padding, weights[0], 0).sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(seen.seen_to_self, np.diagonal(weights[0], axis1=-2, axis2=-1).astype(np.float32))
    assert seen.seen_dx.shape == (4, 1, 4, 4)
    assert seen.seen_dx[0, 0, 0].tolist() == [0, 4, 0, 4]
    assert seen.seen_dy[0, 0, 0].tolist() == [0, 0, 8, 8]
    assert seen.seen_dy[1, 0, 0].tolist() == [0, 0, 8, 0]


def test_attention_that_a_user_makes_has_offsets_and_alignment() -> None:
    weights = torch.tensor(random_attention(GRID, layers=1)[0])
    alone = PatchAttention(weights[:, :, 5:8], GRID, slice(5, 8))
    assert alone.dx[0].tolist() == [-18, -12, -6, 0] * 3  # from patch 3, the last of its row
    assert alone.dy[1].tolist() == [-8] * 4 + [0] * 4 + [8] * 4  # from patch 4, the first of the second row
    aligned = alone.align(alone.to_patches).total
    assert aligned.shape == (3, 2, 5, 7)
    torch.testing.assert_close(aligned.sum((2, 3)), alone.to_patches.sum((2, 3)))
    torch.testing.assert_close(aligned[:, :, 2, 3], alone.to_self.sum(-1))


@settings(max_examples=15, deadline=None)
@given(tiling=tilings)
def test_received_attention_in_any_tiles(tiling: dict[str, Any]) -> None:
    def look(received: ReceivedAttention) -> dict[str, Tensor]:
        assert received.grid == GRID
        both = torch.cat([received.by_prefix, received.by_patches], dim=-1)
        return {"tested": both.sum(-1), "all": both}

    weights = random_attention(GRID, batch=3, heads=3)
    result = feed(declared(look, attention="received").observer(GRID), weights, **tiling).compute()
    np.testing.assert_allclose(result.tested, 1, rtol=1e-6)
    np.testing.assert_allclose(result.values["all"], weights[:, :, :, 2:].mean((1, 3)), rtol=1e-5)


# What a function may return


def test_a_sum_over_queries_is_the_mean_of_its_map() -> None:
    def maps(attention: PatchAttention) -> dict[str, Tensor | QuerySum]:
        weights = attention.to_patches
        return {"tested": weights.amax(-1), "map": weights, "total": QuerySum(weights.sum(2))}

    weights = random_attention(GRID, heads=3)
    result = feed(declared(maps).observer(GRID, per_image=True), weights, rows=5, heads=2).compute()
    assert result.values["map"].shape == (2, 3, 12)
    np.testing.assert_allclose(result.values["total"], result.values["map"], rtol=1e-6)
    np.testing.assert_allclose(result.per_image["total"], np.moveaxis(weights[:, :, :, 2:, 2:].mean(3), 1, 0), rtol=1e-5)
    assert list(result.uniform) == ["tested"]
    assert not {"map", "total"} & set(result.to_dataframe())


def test_values_of_padding_queries_do_not_count() -> None:
    def ones(attention: PatchAttention) -> dict[str, Tensor]:
        weights = attention.to_patches
        return {"tested": torch.ones_like(weights[..., 0]), "pair": torch.ones_like(weights[..., :2])}

    weights = random_attention(TokenGrid(2, 2, (8, 4), 0, False), layers=1, batch=4)
    result = feed(declared(ones).observer(WINDOWS.grid, windows={0: WINDOWS}), weights, rows=3).compute()
    assert (result.tested == 1).all()
    assert (result.pair == 1).all()
    assert result.num_images == 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda a: {"x": a.to_patches.sum((2, 3))},
            r"'x' has shape \(3, 2\); a measure returns one value per image, head and q",
        ),
        (lambda a: {"x": a.to_self.mT}, r"'x' has shape \(3, 12, 2\); .* here \(3, 2, 12\)"),
        (
            lambda a: {"x": a.to_self, "y": QuerySum(a.to_self.sum(0))},
            r"sum over queries 'y' has shape",
        ),
        (
            lambda a: {"x": a.to_patches},
            r"the first value of tested, 'x', has shape \(12,\) per image and head; it must be a single",
        ),
        (lambda a: {"x": a.align(a.to_patches)}, r"the first value of tested, 'x', has shape \(5, 7\) per image and head"),
        (lambda a: {"x": 1.0}, "the value 'x' must be a tensor; got float"),
        (lambda a: {"x": a.to_self.numpy()}, "the value 'x' must be a tensor; got ndarray"),
        (lambda a: a.to_self, "must return a dictionary of named tensors; got Tensor"),
        (lambda a: {}, "must return a dictionary of named tensors; got dict"),
        (lambda a: None, "must return a dictionary of named tensors; got NoneType"),
        (
            lambda a: {"head": a.to_self},
            "a value is called 'head'; names must be identifiers that begin neither",
        ),
        (lambda a: {"x": a.to_self, "std": a.to_self}, "a value is called 'std'"),
        (lambda a: {"self mass": a.to_self}, "a value is called 'self mass'; names must be identifiers"),
        (lambda a: {0: a.to_self}, "a value is called 0; names must be identifiers"),
    ],
)
def test_what_a_function_may_not_return(function: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        feed(declared(function).observer(GRID), random_attention(GRID))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda r: {"x": r.by_patches.mean(1)},
            r"'x' has shape \(3, 12\); a measure of received attention returns one value per",
        ),
        (lambda r: {"x": r.by_patches}, r"the first value of tested, 'x', has shape \(12,\) per image and head"),
        (lambda r: {"x": QuerySum(r.by_patches)}, "the value 'x' must be a tensor; got QuerySum"),
        (lambda r: r.by_patches, "must return a dictionary of named tensors; got Tensor"),
    ],
)
def test_what_a_function_of_received_attention_may_not_return(function: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        feed(declared(function, attention="received").observer(GRID), random_attention(GRID))


def test_received_attention_refuses_windows() -> None:
    total = declared(lambda received: {"x": received.by_patches.sum(-1)}, attention="received")
    with pytest.raises(
        InputError,
        match=r"^tested sums the attention of all queries of an image, but 4 layers of this model \(the first is layer 0\)",
    ):
        total(swin(), images(48, 48), device="cpu")


def test_values_that_are_not_finite() -> None:
    with pytest.raises(InputError, match="values of tested are not all finite"):
        declared(lambda a: {"x": a.to_self * torch.nan})(small_vit(), images(), device="cpu")


def test_gradients_may_flow_beside_a_measure() -> None:
    model, x = small_vit(), images()
    entropy = declared(lambda a: {"x": a.to_self, "aligned": a.align(a.to_patches)})
    with attention_hooks(model, one := entropy.observer(model.token_grid(24, 24))):
        model(x).sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    np.testing.assert_allclose(one.compute().x, entropy(model, x, device="cpu").x, rtol=1e-5)


# Names and labels


def test_the_first_value_is_what_is_drawn() -> None:
    def two(attention: PatchAttention) -> dict[str, Tensor]:
        """Two values."""
        return {"self_share": attention.to_self, "prefix_share": attention.to_prefix.sum(-1)}

    result = head_measure(unit="share", reference="a test", label="Attention on itself")(two)(
        small_vit(), images(), device="cpu"
    )
    assert (result.measure, result.main) == ("two", "self_share")
    assert result.plot().get_ylabel() == "Attention on itself (share)"
    assert list(result.to_dataframe())[3:8] == ["self_share", "std", "confidence", "prefix_share", "uniform_self_share"]
    assert list(result.summary())[1:] == ["mean self share (share)", "lowest head", "highest head", "prefix share"]
    np.testing.assert_allclose(result.uniform_prefix_share, 1 / 13)
    with pytest.raises(AttributeError, match="HeadResult of two has no value 'entropy'"):
        _ = result.entropy
