"""attention_hooks: what observers are shown, what the model returns, and that everything is restored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests import reference
from tests.example_models import (
    FAMILIES,
    Assemble,
    Encoder,
    Largest,
    expected_attention,
    images,
    output,
    small_vit,
)
from vit_probe import AttentionTile, InputError, attention_hooks
from vit_probe.attention.calls import AttentionCall
from vit_probe.attention.intercept import ForwardStopped
from vit_probe.attention.tiles import AttentionInputs


class Attention(nn.Module):
    """The fused attention of its inputs, as a model."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **options)


def qkv(batch: int = 2, heads: int = 3, tokens: int = 7, dim: int = 4, *, key_heads: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch + 10 * heads + 100 * tokens + 1000 * dim)
    return [
        1.5 * torch.randn(batch, count, tokens, dim, generator=generator)
        for count in (heads, key_heads or heads, key_heads or heads)
    ]


def hooked(model: nn.Module, *inputs: Tensor, tile_bytes: int = 4 << 20, **options: Any) -> tuple[Any, Assemble]:
    recorded = Assemble()
    with attention_hooks(model, recorded, tile_bytes=tile_bytes):
        return model(*inputs, **options), recorded


def close(a: Any, b: Any, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance)


def traces(model: nn.Module) -> list[Any]:
    """Everything that hooks could change and fail to restore."""
    stores = [{k: list(v) for k, v in vars(module).items() if "hooks" in k and v is not None} for module in model.modules()]
    return [stores, torch.backends.mha.get_fastpath_enabled(), torch._C._len_torch_function_stack()]


@contextlib.contextmanager
def leaves_nothing(model: nn.Module) -> Iterator[None]:
    own = next(iter(model.modules())).register_forward_hook(lambda *_: None)  # a user's hook stays
    before = traces(model)
    yield
    assert traces(model) == before
    own.remove()


# What observers see, and what the model returns


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tile_bytes", [1, 5000, 4 << 20])
def test_output_and_attention_of_every_family(name: str, tile_bytes: int) -> None:
    family = FAMILIES[name]
    model, x = family.model(), family.images()
    with torch.no_grad():
        untouched = output(model(x))
        with leaves_nothing(model):
            result, recorded = hooked(model, x, tile_bytes=tile_bytes)
    assert 0.05 < untouched.std() < 20
    close(output(result), untouched, 1e-5)
    expected = expected_attention(model, x)
    assert expected.shape == (2, 3, 2, family.grid.num_tokens, family.grid.num_tokens)
    assert expected.max(-1).mean() > 2 / family.grid.num_tokens  # far from uniform
    close(recorded.attention(), expected, 1e-6)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("timm")])
def test_attention_matches_timm_without_fused_attention(name: str) -> None:
    model, x = FAMILIES[name].model(), FAMILIES[name].images()
    _, recorded = hooked(model, x)
    maps: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda module, args: maps.append(args[0].detach()))
    model(x)
    close(recorded.attention(), torch.stack(maps), 1e-6)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("transformers")])
def test_attention_matches_transformers_eager(name: str) -> None:
    model, x = FAMILIES[name].model(), FAMILIES[name].images()
    assert model.config._attn_implementation == "sdpa"
    _, recorded = hooked(model, x)
    model.set_attn_implementation("eager")
    close(recorded.attention(), torch.stack(model(x, output_attentions=True).attentions).detach(), 1e-6)


def test_the_fast_path_of_multihead_attention_is_captured() -> None:
    model, x = Encoder(norm_first=True).eval(), images(32, 48)
    torch.backends.mha.set_fastpath_enabled(True)
    with torch.no_grad():
        untouched = model(x)
        result, recorded = hooked(model, x)
    close(result, untouched, 1e-5)
    assert sorted(recorded.layers) == [0, 1]


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 9),
    budget=st.integers(1, 4000),
    double=st.booleans(),
)
def test_every_tile_size_gives_the_same_result(batch: int, heads: int, tokens: int, budget: int, double: bool) -> None:
    q, k, v = (t.to(torch.float64 if double else torch.float32) for t in qkv(batch, heads, tokens))
    result, recorded = hooked(Attention(), q, k, v, tile_bytes=budget)
    close(result, F.scaled_dot_product_attention(q, k, v), 1e-12 if double else 1e-5)
    close(recorded.attention()[0], reference.softmax_attention(q, k, 0.5), 1e-12 if double else 1e-6)
    one_query = tokens * q.element_size()
    assert all(tile.probabilities.nbytes <= max(budget, one_query) for tile in recorded.tiles)
    assert {tile.probabilities.dtype for tile in recorded.tiles} == {q.dtype}
    if budget < 2 * one_query:
        assert {tile.probabilities.shape[:3] for tile in recorded.tiles} == {(1, 1, 1)}


@pytest.mark.parametrize("tile_bytes", [1, 200, 700, 3000, 4 << 20])
def test_tiles_come_by_layer_then_images_queries_and_heads(tile_bytes: int) -> None:
    _, recorded = hooked(small_vit(), images(), tile_bytes=tile_bytes)
    layer = image = query = head = 0
    for tile in recorded.tiles:
        assert (tile.layer, tile.images.start, tile.queries.start, tile.heads.start) == (layer, image, query, head)
        assert (tile.num_heads, tile.num_tokens, tile.name) == (2, 13, f"blocks.{layer}.attn")
        extents = [part.stop - part.start for part in (tile.images, tile.heads, tile.queries)]
        assert tile.probabilities.shape == (*extents, 13)
        head = tile.heads.stop % 2
        if head == 0:
            query = tile.queries.stop % 13
        if head == query == 0:
            image = tile.images.stop % 3
        layer += head == query == image == 0
    assert (layer, image, query, head) == (2, 0, 0, 0)


def test_every_observer_sees_every_tile() -> None:
    model, first, second = small_vit(), Assemble(), Assemble()
    with attention_hooks(model, first, second, tile_bytes=500):
        model(images())
    assert len(first.tiles) == len(second.tiles) > 4
    close(first.attention(), second.attention(), 0)


def test_only_the_last_observer_may_write_to_a_tile() -> None:
    class Spoils(Assemble):
        def update(self, tile: AttentionTile) -> None:
            super().update(tile)
            assert tile.disposable
            tile.probabilities.fill_(torch.nan)

    model, first, last = small_vit(), Assemble(), Spoils()
    with torch.no_grad():
        plain = model(images())
        with attention_hooks(model, first, last, tile_bytes=500):
            output = model(images())
    assert not any(tile.disposable for tile in first.tiles)
    close(first.attention(), last.attention(), 0)
    close(output, plain, 1e-5)


@pytest.mark.parametrize(
    ("tokens", "numbers", "shape"),
    [
        (7, 1 << 20, (2, 3, 7)),
        (7, 147, (1, 3, 7)),  # a whole image
        (7, 146, (1, 1, 7)),  # one head, so that the product has more queries
        (70, 14000, (1, 3, 35)),  # of all heads at least 64 queries would fit; two equal parts
        (70, 13439, (1, 1, 70)),  # 63 would, so one head
        (70, 300, (1, 1, 4)),
        (40, 30, (1, 1, 1)),
    ],
)
def test_heads_are_split_if_there_are_many_tokens(tokens: int, numbers: int, shape: tuple[int, int, int]) -> None:
    q, k, v = qkv(2, 3, tokens)
    result, recorded = hooked(Attention(), q, k, v, tile_bytes=4 * numbers)
    assert tuple(recorded.tiles[0].probabilities.shape[:3]) == shape
    close(result, F.scaled_dot_product_attention(q, k, v), 1e-5)
    close(recorded.attention()[0], torch.softmax(0.5 * q.double() @ k.double().mT, dim=-1), 1e-6)


def test_the_map_of_a_long_sequence_is_never_held() -> None:
    q, k, v = qkv(1, 4, 2048, 8)

    class RowSums:
        rows = 0

        def update(self, tile: AttentionTile) -> None:
            close(tile.probabilities.sum(dim=-1), 1.0, 1e-5)
            self.rows += tile.probabilities[..., 0].numel()

    with Largest() as largest, attention_hooks(model := Attention(), sums := RowSums(), tile_bytes=1 << 20):
        result = model(q, k, v)
    assert sums.rows == 4 * 2048
    assert largest.nbytes <= 1 << 20  # the map of all heads has 64 MiB
    close(result, F.scaled_dot_product_attention(q, k, v), 1e-5)


# Masks, scale, grouped queries


def _masks() -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    keep = torch.rand(2, 3, 7, 7, generator=generator) > 0.4
    keep[..., 0] = True
    shut = keep.clone()
    shut[0, 1, 3] = False
    shut[1, :, 5] = False
    bias = 2 * torch.randn(2, 3, 7, 7, generator=generator)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    return {
        "boolean": dict(attn_mask=keep),
        "one for all": dict(attn_mask=keep[0, 0]),
        "by image": dict(attn_mask=keep[:, :1]),
        "by head": dict(attn_mask=keep[0]),
        "by key": dict(attn_mask=keep[:, :1, :1]),
        "additive": dict(attn_mask=bias),
        "additive by image": dict(attn_mask=bias[:, :1]),
        "minus infinity": dict(attn_mask=bias.masked_fill(~keep, -torch.inf)),
        "boolean, nothing left": dict(attn_mask=shut),
        "additive, nothing left": dict(attn_mask=bias.masked_fill(~shut, -torch.inf)),
        "causal": dict(is_causal=True, expected=causal),
        "causal and boolean": dict(is_causal=True, attn_mask=keep, expected=keep & causal),
    }


@pytest.mark.parametrize("tile_bytes", [1, 400, 4 << 20])
@pytest.mark.parametrize("name", _masks())
def test_masks(name: str, tile_bytes: int) -> None:
    options = _masks()[name]
    mask = options.pop("expected", options.get("attn_mask"))
    q, k, v = qkv()
    untouched = F.scaled_dot_product_attention(q, k, v, **options)
    result, recorded = hooked(Attention(), q, k, v, tile_bytes=tile_bytes, **options)
    close(result, untouched, 1e-5)
    with np.errstate(invalid="ignore"):
        expected = reference.softmax_attention(q, k, 0.5, mask)
    assert np.isnan(expected).any() == ("nothing left" in name)
    close(recorded.attention()[0], np.nan_to_num(expected), 1e-6)


@pytest.mark.parametrize("mask", [None, torch.ones(7, 7, dtype=torch.bool)])
def test_a_models_nan_stays_a_nan(mask: Tensor | None) -> None:
    q, k, v = qkv()
    q[0, 1, 2, 3] = torch.nan
    result, _ = hooked(Attention(), q, k, v, attn_mask=mask)  # the fused kernel itself: 0 without a mask, NaN with one
    assert result[0, 1, 2].isnan().all()
    assert result.isnan().sum() == 4


@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_scale(scale: float) -> None:
    q, k, v = qkv()
    result, recorded = hooked(Attention(), q, k, v, scale=scale)
    close(result, F.scaled_dot_product_attention(q, k, v, scale=scale), 1e-5)
    close(recorded.attention()[0], reference.softmax_attention(q, k, scale), 1e-6)


def test_grouped_queries_and_their_gradients() -> None:
    inputs = [t.requires_grad_() for t in qkv(heads=4, key_heads=2)]
    q, k, v = inputs
    untouched = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with torch.no_grad():
        result, _ = hooked(Attention(), q, k, v, enable_gqa=True)
    close(result, untouched.detach(), 1e-5)
    result, recorded = hooked(Attention(), q, k, v, enable_gqa=True)
    close(recorded.attention()[0], reference.softmax_attention(q.detach(), k.detach().repeat_interleave(2, 1), 0.5), 1e-6)
    for mine, theirs in zip(
        torch.autograd.grad(result.sin().sum(), inputs), torch.autograd.grad(untouched.sin().sum(), inputs), strict=True
    ):
        close(mine, theirs, 1e-6)


def test_one_key_for_all_images_or_heads() -> None:
    q, k, v = qkv()
    for few in ((k[:1], v), (k, v[:, :1]), (k[:, :1], v[:1])):
        result, recorded = hooked(Attention(), q, *few, tile_bytes=300)
        close(result, F.scaled_dot_product_attention(q, *few), 1e-5)
        close(recorded.attention()[0], reference.softmax_attention(q, few[0].expand_as(q), 0.5), 1e-6)


def test_values_of_another_width() -> None:
    q, k, v = qkv()
    result, _ = hooked(Attention(), q, k, torch.cat([v, v], dim=-1), tile_bytes=300)
    close(result, F.scaled_dot_product_attention(q, k, torch.cat([v, v], dim=-1)), 1e-5)


# Observers that decline


class Declines(Assemble):
    """Wants the tiles of some layers only; keeps the inputs of all."""

    def __init__(self, *layers: int) -> None:
        super().__init__()
        self.wanted = layers
        self.inputs: list[AttentionInputs] = []

    def begin_layer(self, inputs: AttentionInputs) -> bool:
        assert not any(tile.layer == inputs.layer for tile in self.tiles)
        self.inputs.append(inputs)
        return inputs.layer in self.wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_the_inputs_of_a_layer_give_its_attention(name: str) -> None:
    model, x = FAMILIES[name].model(), FAMILIES[name].images()
    with torch.no_grad(), attention_hooks(model, recorded := Declines()) as hooks:
        model(x)
    attention = []
    for inputs in recorded.inputs:
        scores = inputs.scale * (inputs.query.double() @ inputs.key.double().mT)
        assert scores.shape[:2] == (3, 2)
        attention.append(torch.softmax(scores if inputs.bias is None else scores + inputs.bias, dim=-1))
    close(torch.stack(attention), expected_attention(model, x), 1e-6)
    assert [(inputs.layer, inputs.name) for inputs in recorded.inputs] == list(enumerate(hooks.layers))
    assert not recorded.tiles


def test_the_inputs_of_a_layer_have_all_heads_and_are_cast_by_autocast() -> None:
    q, k, v = qkv(heads=4, key_heads=2)
    with torch.autocast("cpu", dtype=torch.bfloat16), attention_hooks(model := Attention(), recorded := Declines()):
        model(q, k, v, enable_gqa=True)
    (inputs,) = recorded.inputs
    assert inputs.query.dtype == inputs.key.dtype == torch.bfloat16
    close(inputs.key.float(), k.bfloat16().repeat_interleave(2, dim=1).float(), 0)


def test_one_observer_declines_and_another_gets_all_layers() -> None:
    model, x = small_vit(depth=3), images()
    untouched, expected = model(x).detach(), expected_attention(model, x)
    with (
        torch.no_grad(),
        attention_hooks(model, some := Declines(1), recorded := Assemble(), none := Declines(), tile_bytes=500),
    ):
        close(model(x), untouched, 1e-5)
    close(recorded.attention(), expected, 1e-6)
    assert set(some.layers) == {1}
    close(some.layers[1], expected[1], 1e-6)
    assert not none.tiles
    assert [len(one.inputs) for one in (some, none)] == [3, 3]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("grad", [True, False])
def test_if_all_observers_decline_the_output_is_the_models_own(name: str, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = FAMILIES[name].model(), FAMILIES[name].images()
    torch.backends.mha.set_fastpath_enabled(False)  # which rounds otherwise
    try:
        with torch.set_grad_enabled(grad):
            untouched = output(model(x))
            monkeypatch.setattr("vit_probe.attention.tiles.TiledAttention.__call__", None)
            with leaves_nothing(model), attention_hooks(model, Declines(), Declines(7)) as hooks:
                result = output(model(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert len(hooks.layers) == 2
    assert torch.equal(result, untouched)


def test_without_observers_the_output_is_the_models_own() -> None:
    model, x = small_vit(), images()
    with attention_hooks(model):
        result = model(x)
    assert torch.equal(result, model(x))


def test_the_map_of_a_declined_layer_is_never_computed() -> None:
    q, k, v = (tensor.clone() for tensor in qkv(1, 4, 1024, 8))
    with attention_hooks(model := Attention(), Declines()), Largest() as largest:
        result = model(q, k, v)
    assert largest.nbytes < 1024 * 1024 * 4
    assert torch.equal(result, F.scaled_dot_product_attention(q, k, v))


def test_stop_after_a_declined_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, recorded = small_vit(depth=3), images(), Declines()
    fused, calls = AttentionCall.output, []
    monkeypatch.setattr(AttentionCall, "output", lambda call: calls.append(call.layer) or fused(call))
    with torch.no_grad(), attention_hooks(model, recorded) as hooks:
        for stop in (0, 1, 2):
            hooks.stop_after = stop
            with pytest.raises(ForwardStopped):
                model(x)
        hooks.stop_after = None
        result = model(x)
    assert torch.equal(result, model(x))
    assert calls == [0, 0, 1, 0, 1, 2]  # the result of the layer at which the pass ends is not needed
    assert [inputs.layer for inputs in recorded.inputs] == [0, 0, 1, 0, 1, 2, 0, 1, 2]
    assert hooks.layers == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]


def test_nested_contexts_where_one_observer_declines() -> None:
    model, x = small_vit(), images()
    expected = expected_attention(model, x)
    for first, second in ((Declines(), Assemble()), (Assemble(), Declines())):
        with torch.no_grad(), attention_hooks(model, first), attention_hooks(model, second):
            model(x)
        for one in (first, second):
            if isinstance(one, Declines):
                assert not one.tiles
                assert len(one.inputs) == 2
            else:
                close(one.attention(), expected, 1e-6)


def test_weights_that_only_the_model_asks_for() -> None:
    model = Weighted(average=False).eval()
    x = 2 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    untouched = model(x)
    with attention_hooks(model, recorded := Declines()):
        result, weights = model(x)
    assert torch.equal(result, untouched[0])
    assert torch.equal(weights, untouched[1])
    assert len(recorded.inputs) == 1


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ours", "timm-registers", "torchvision"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model, x = FAMILIES[name].model().to(dtype), FAMILIES[name].images().to(dtype)
    with torch.no_grad():
        untouched = model(x)
        result, recorded = hooked(model, x)
    assert result.dtype == dtype
    close(result.float(), untouched.float(), 0.06 if dtype == torch.bfloat16 else 0.01)
    assert {tile.probabilities.dtype for tile in recorded.tiles} == {torch.float32}
    # Only the first layer's inputs are the same to the last bit.
    close(recorded.attention()[0], expected_attention(model, x)[0], 1e-6)


def test_scores_beyond_float16() -> None:
    q, k, v = (1000 * t.half() for t in qkv())
    result, recorded = hooked(Attention(), q, k, v / 1000)
    expected = reference.softmax_attention(q, k, 0.5)
    assert (expected > 0.999).any()
    close(recorded.attention()[0], expected, 1e-6)
    assert result.isfinite().all()


def test_double_precision() -> None:
    model, x = small_vit().double(), images().double()
    with torch.no_grad():
        result, recorded = hooked(model, x)
        close(result, model(x), 1e-12)
    close(recorded.attention(), expected_attention(model, x), 1e-12)


def test_autocast_casts_as_without_hooks() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        untouched = F.scaled_dot_product_attention(q, k, v)
        result, recorded = hooked(Attention(), q, k, v)
        assert torch.is_autocast_enabled("cpu")
    assert result.dtype == untouched.dtype == torch.bfloat16
    close(result.float(), untouched.float(), 0.02)
    close(recorded.attention()[0], reference.softmax_attention(q.bfloat16().float(), k.bfloat16().float(), 0.5), 1e-6)


def test_autocast_leaves_double_precision_alone() -> None:
    q, k, v = (tensor.double() for tensor in qkv())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        untouched = F.scaled_dot_product_attention(q, k, v)
        result, recorded = hooked(Attention(), q, k, v)
    assert result.dtype == untouched.dtype == torch.float64
    close(result, untouched, 1e-12)
    close(recorded.attention()[0], reference.softmax_attention(q, k, 0.5), 1e-12)


def test_observers_compute_outside_autocast() -> None:
    products = []

    class Multiply:
        def update(self, tile: AttentionTile) -> None:
            products.append(tile.probabilities @ tile.probabilities.mT)

    model = small_vit()
    with torch.autocast("cpu", dtype=torch.bfloat16), attention_hooks(model, Multiply()):
        model(images())
    assert {product.dtype for product in products} == {torch.float32}


# Gradients, training, inference


@pytest.mark.parametrize("name", ["ours", "timm-beit", "transformers-vit", "torchvision"])
def test_gradients_are_those_without_hooks(name: str) -> None:
    model, x = FAMILIES[name].model(), FAMILIES[name].images()

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        output(model(x)).sin().sum().backward()
        return [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    untouched = gradients()
    with attention_hooks(model, recorded := Assemble()):
        hooked_gradients = gradients()
    assert recorded.tiles
    assert not any(tile.probabilities.requires_grad for tile in recorded.tiles)
    assert sum(g is not None and bool(g.abs().max() > 1e-3) for g in untouched) > 10
    for mine, theirs in zip(hooked_gradients, untouched, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            close(mine, theirs, 1e-5 * max(1.0, float(theirs.abs().max())))


def test_the_gradient_reaches_a_mask_alone() -> None:
    q, k, v = qkv()
    bias = torch.randn(7, 7).requires_grad_()
    result, _ = hooked(Attention(), q, k, v, attn_mask=bias)
    (mine,) = torch.autograd.grad(result.sin().sum(), bias)
    (theirs,) = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, bias).sin().sum(), bias)
    close(mine, theirs, 1e-6)


@pytest.mark.parametrize("grad", [True, False])
def test_attention_dropout_is_drawn_as_without_hooks(grad: bool) -> None:
    model = FAMILIES["timm"].model().train()
    for block in model.blocks:
        block.attn.attn_drop.p = 0.5
    x = FAMILIES["timm"].images()
    with torch.set_grad_enabled(grad):
        torch.manual_seed(5)
        untouched = model(x)
        torch.manual_seed(5)
        result, recorded = hooked(model, x)
        torch.manual_seed(6)
        assert (model(x) - untouched).abs().max() > 1e-3
    close(result.detach(), untouched.detach(), 1e-6)
    close(recorded.attention().sum(-1), 1.0, 1e-5)  # taken before dropout


def test_training_mode_is_kept() -> None:
    model = small_vit(dropout=0.3).train()
    torch.manual_seed(5)
    untouched = model(images())
    torch.manual_seed(5)
    result, _ = hooked(model, images())
    assert model.training
    close(result.detach(), untouched.detach(), 1e-6)


def test_inference_mode_inside_and_outside() -> None:
    model, x = small_vit(), images()
    _, expected = hooked(model, x)
    outside, inside = Assemble(), Assemble()
    with torch.inference_mode(), attention_hooks(model, outside):
        result = model(x)
    assert result.is_inference()
    with attention_hooks(model, inside):
        with torch.inference_mode():
            model(x)
        close(inside.attention(), expected.attention(), 1e-6)
        with torch.no_grad():  # the same workspace, in another mode
            assert not model(x).is_inference()
        model(x).sum().backward()
    close(outside.attention(), expected.attention(), 1e-6)


# Layers


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_named_by_module_and_numbered_by_order(name: str) -> None:
    model, x = FAMILIES[name].model(), FAMILIES[name].images()
    recorded = Assemble()
    with attention_hooks(model, recorded) as hooks:
        for _ in range(3):
            model(x)
    assert len(hooks.layers) == 2
    assert all(isinstance(model.get_submodule(path), nn.Module) for path in hooks.layers)
    assert [path.replace("1", "0") for path in hooks.layers] == [hooks.layers[0]] * 2
    assert recorded.names == dict(enumerate(hooks.layers))
    assert [tile.layer for tile in recorded.tiles] == [0, 1] * 3


def test_layers_keep_their_numbers_when_parts_are_called() -> None:
    model, x = small_vit(), images()
    with attention_hooks(model, recorded := Assemble()) as hooks:
        for _ in range(2):
            model.forward_features(x)
        model(x)
        model.forward_features(x)
    assert hooks.layers == ["blocks.0.attn", "blocks.1.attn"]
    assert [tile.layer for tile in recorded.tiles] == [0, 1] * 4


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attn(self.attn(q, k, v), k, v)


def test_a_module_called_twice_is_two_layers() -> None:
    model, recorded = Twice(), Assemble()
    q, k, v = qkv()
    with attention_hooks(model, recorded) as hooks:
        model(q, k, v)
        model(q, k, v)
    assert hooks.layers == ["attn", "attn"]
    assert [tile.layer for tile in recorded.tiles] == [0, 1, 0, 1]
    second = F.scaled_dot_product_attention(q, k, v)
    close(recorded.layers[1], reference.softmax_attention(second, k, 0.5), 1e-5)


def test_a_model_that_calls_attention_itself_has_an_empty_path() -> None:
    with attention_hooks(model := Attention()) as hooks:
        model(*qkv())
    assert hooks.layers == [""]


def test_attention_over_other_keys_is_skipped_and_listed() -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, class_token=False, global_pool="map"
    ).eval()  # fmt: skip
    untouched = model(images(16, 16))
    with attention_hooks(model, recorded := Assemble()) as hooks:
        for _ in range(2):
            close(model(images(16, 16)).detach(), untouched.detach(), 1e-5)
    assert hooks.layers == ["blocks.0.attn", "blocks.1.attn"]
    assert hooks.skipped == {"attn_pool": "1 query for 4 keys"}
    assert set(recorded.layers) == {0, 1}


class Cross(nn.Module):
    """Attends from one sequence to another of the same length, by `scaled_dot_product_attention` itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention2()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attn(self.attn(x), y)


class Attention2(nn.Module):
    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        q, k = x[:, None], (x if context is None else context)[:, None]
        return F.scaled_dot_product_attention(q, k, k, mask)[:, 0]


def test_two_sequences_of_the_same_length_are_cross_attention() -> None:
    x, y = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    with attention_hooks(model := Cross(), recorded := Assemble()) as hooks:
        model(x, y)
    assert hooks.layers == ["attn"]
    assert hooks.skipped == {"attn": "the queries come from one sequence, the keys from another"}
    close(recorded.attention()[0, :, 0], reference.softmax_attention(x[:, None], x[:, None], 8**-0.5)[:, 0], 1e-6)


def test_a_mask_is_not_a_second_sequence() -> None:
    x, mask = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 5, 5)
    with attention_hooks(model := Attention2()) as hooks:
        model(x, None, mask[:, None])
        model(x, mask=mask.unsqueeze(1))
    assert hooks.layers == [""]
    assert hooks.skipped == {}


class Folded(nn.Module):
    """Images and heads in one dimension, as timm's SAM has them."""

    def __init__(self, num_heads: int | None) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask.flatten(0, 1))


@pytest.mark.parametrize("masked", [False, True])
def test_images_and_heads_in_one_dimension(masked: bool) -> None:
    q, k, v = qkv()
    mask = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0)) if masked else None
    result, recorded = hooked(Folded(3), q, k, v, mask)
    close(result.unflatten(0, (2, 3)), F.scaled_dot_product_attention(q, k, v, mask), 1e-5)
    close(recorded.attention()[0], reference.softmax_attention(q, k, 0.5, mask), 1e-6)


def test_heads_that_cannot_be_separated_from_images_are_skipped() -> None:
    q, k, v = qkv()
    model = nn.ModuleDict({"folded": Folded(None), "grouped": Attention(), "plain": Attention()})
    model.forward = lambda: (  # type: ignore[method-assign]
        model["folded"](q, k, v),
        model["grouped"](q[None], k[None], v[None]),
        model["plain"](q, k, v),
    )
    with attention_hooks(model) as hooks:
        folded, *_ = model()
    close(folded, F.scaled_dot_product_attention(q, k, v).flatten(0, 1), 1e-6)
    assert hooks.layers == ["plain"]
    assert hooks.skipped == {
        "folded": "attention of shape (6, 7, 7), whose heads cannot be separated from the images",
        "grouped": "attention of shape (1, 2, 3, 7, 7): a separate dimension for windows is not supported",
    }


# nn.MultiheadAttention that is asked for its weights


class Weighted(nn.Module):
    """Returns its attention's output and weights; `of` chooses the keys."""

    def __init__(self, *, average: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, dropout=dropout)
        self.average = average

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        keys = x if y is None else y
        return self.attn(x, keys, keys, average_attn_weights=self.average)


def test_weights_that_the_model_asks_for_are_shown_to_observers() -> None:
    model = Weighted(average=False).eval()
    x = 2 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    untouched = model(x)
    (result, weights), recorded = hooked(model, x)
    close(result.detach(), untouched[0].detach(), 1e-6)
    close(weights.detach(), untouched[1].detach(), 1e-6)
    close(recorded.attention()[0], untouched[1].detach(), 1e-6)
    result.sum().backward()
    assert model.attn.in_proj_weight.grad is not None
    with attention_hooks(model, outer := Assemble()), attention_hooks(model, inner := Assemble()):
        model(x)
    close(outer.attention(), inner.attention(), 1e-6)
    assert len(outer.tiles) == len(inner.tiles) == 1


def test_weights_and_dropout_are_drawn_as_without_hooks() -> None:
    model, x = Weighted(dropout=0.5).train(), torch.randn(2, 5, 8)
    torch.manual_seed(3)
    untouched = model(x)
    torch.manual_seed(3)
    (result, weights), recorded = hooked(model, x)
    close(result.detach(), untouched[0].detach(), 1e-6)
    close(weights.detach(), untouched[1].detach(), 1e-6)
    close(recorded.attention().sum(-1), 1.0, 1e-5)


def test_cross_attention_with_weights_is_skipped() -> None:
    model, (x, y) = Weighted().eval(), torch.randn(2, 2, 5, 8)
    model_with_self = nn.Sequential(small_vit())
    model_with_self.add_module("cross", model)
    with attention_hooks(model_with_self) as hooks:
        close(model_with_self.cross(x, y)[0].detach(), model(x, y)[0].detach(), 1e-6)
        model_with_self[0](images())
    assert hooks.skipped == {"cross.attn": "the queries come from one sequence, the keys from another"}
    assert hooks.layers == ["0.blocks.0.attn", "0.blocks.1.attn"]


# Compiled and recorded models


@pytest.mark.parametrize("how", ["model", "in place", "blocks", "function"])
def test_compiled_models_run_uncompiled_inside_the_context(how: str) -> None:
    model, x = FAMILIES["timm"].model(), FAMILIES["timm"].images()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            graphs.append(graph)
            return graph(*args)

        return run

    call: Any = model
    if how == "model":
        call = model = torch.compile(model, backend=backend)
    elif how == "in place":
        model.compile(backend=backend)
    elif how == "blocks":
        for index, block in enumerate(model.blocks):
            model.blocks[index] = torch.compile(block, backend=backend)
    else:
        call = torch.compile(lambda y: model(y), backend=backend)
    with torch.no_grad():
        untouched = call(x)
        assert graphs
        graphs.clear()
        with attention_hooks(model, recorded := Assemble()) as hooks:
            close(call(x), untouched, 1e-5)
        assert not graphs
        assert [name.split(".")[-1] for name in hooks.layers] == ["attn", "attn"]
        close(recorded.attention(), expected_attention(FAMILIES["timm"].model(), x), 1e-6)
        call(x)
    assert graphs


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "DataParallel", "AveragedModel"])
def test_attention_is_captured_through_wrappers(wrapper: str, tmp_path: Path) -> None:
    model, x = small_vit(), images()
    expected = expected_attention(model, x)
    if wrapper == "DistributedDataParallel":
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        wrapped = getattr(torch.optim.swa_utils if wrapper == "AveragedModel" else nn.parallel, wrapper)(model)
        with torch.no_grad(), attention_hooks(wrapped, recorded := Assemble(), verify=True) as hooks:
            wrapped(x)
    finally:
        if wrapper == "DistributedDataParallel":
            torch.distributed.destroy_process_group()
    assert hooks.layers == ["module.blocks.0.attn", "module.blocks.1.attn"]
    close(recorded.attention(), expected, 1e-6)


def test_exported_models_are_captured() -> None:
    model, x = FAMILIES["timm"].model(), FAMILIES["timm"].images()
    graph = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        result, recorded = hooked(graph, x)
        close(result, model(x), 1e-5)
    close(recorded.attention(), expected_attention(model, x), 1e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_model_raises_with_the_remedy() -> None:
    model, x = FAMILIES["timm"].model(), FAMILIES["timm"].images()
    with torch.no_grad():
        graph = torch.jit.trace(model, x)
    with (
        pytest.raises(
            InputError,
            match=r"no self-attention could be captured.* if torch.jit traced or scripted a module, pass the original one",
        ),
        attention_hooks(graph),
    ):
        graph(x)


def test_attention_outside_the_model_is_ignored() -> None:
    model, other = small_vit(), small_vit(depth=3)
    untouched = other(images()).detach()
    with attention_hooks(model, recorded := Assemble()) as hooks:
        model(images())
        close(other(images()).detach(), untouched, 1e-6)
        F.scaled_dot_product_attention(*qkv())
    assert hooks.layers == ["blocks.0.attn", "blocks.1.attn"]
    assert len(recorded.tiles) == 2


# What is left behind


def fails_at(model: nn.Module, error: BaseException) -> Any:
    def fail(module: nn.Module, args: Any) -> None:
        raise error

    return model.blocks[1].mlp.register_forward_pre_hook(fail)


@pytest.mark.parametrize("fastpath", [True, False])
@pytest.mark.parametrize("where", ["model", "interrupt", "observer", "stop", "body", "success"])
def test_all_hooks_and_settings_are_restored(where: str, fastpath: bool) -> None:
    class Fails(Assemble):
        def update(self, tile: AttentionTile) -> None:
            if where == "observer" and tile.layer == 1:
                raise RuntimeError("broken")

    model = small_vit()
    if where in ("model", "interrupt"):
        fails_at(model, RuntimeError("broken") if where == "model" else KeyboardInterrupt("broken"))
    raises = {"interrupt": KeyboardInterrupt, "stop": ForwardStopped}.get(where, RuntimeError)
    was = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        with leaves_nothing(model):
            with contextlib.nullcontext() if where == "success" else pytest.raises(raises):  # noqa: SIM117
                with attention_hooks(model, Fails()) as hooks:
                    assert not torch.backends.mha.get_fastpath_enabled()
                    if where == "stop":
                        hooks.stop_after = 0
                    model(images())
                    if where == "body":
                        raise RuntimeError("broken")
            assert torch.backends.mha.get_fastpath_enabled() is fastpath
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def test_a_failed_pass_does_not_affect_the_next() -> None:
    model = small_vit()
    failing = fails_at(model, RuntimeError("broken"))
    recorded = Assemble()
    with attention_hooks(model, recorded) as hooks:
        with pytest.raises(RuntimeError, match="broken"):
            model(images())
        failing.remove()
        model.forward_features(images())
        assert hooks.layers == ["blocks.0.attn", "blocks.1.attn"]
        assert recorded.names == dict(enumerate(hooks.layers))


def test_an_error_in_a_users_hook_that_the_model_catches() -> None:
    """The hooks of a module that never began must not end the module around it."""

    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.optional, self.attn = nn.Identity(), Attention()

        def forward(self, *inputs: Tensor) -> Tensor:
            with contextlib.suppress(RuntimeError):
                self.optional(inputs[0])
            return F.scaled_dot_product_attention(*inputs) + self.attn(*inputs)

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("broken")

    model = nn.ModuleDict({"careful": Careful()})
    model.forward = model["careful"].forward  # type: ignore[method-assign]
    model["careful"].optional.register_forward_pre_hook(fail)
    with attention_hooks(model["careful"], recorded := Assemble()) as hooks:
        model["careful"](*qkv())
    assert hooks.layers == ["", "attn"]
    assert len(recorded.tiles) == 2


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ForwardStopped])
def test_an_interrupted_pass_does_not_affect_the_next(interruption: type[BaseException]) -> None:
    """After a BaseException that is not an Exception, torch runs no hooks, so modules seem to be running still."""
    model, x = small_vit(), images()
    failing = fails_at(model, interruption())
    with attention_hooks(model, recorded := Assemble()) as hooks:
        with pytest.raises(interruption):
            model(x)
        failing.remove()
        model(x)
        F.scaled_dot_product_attention(*qkv())  # not a call of the model, which the interrupted pass would claim
    assert hooks.layers == ["blocks.0.attn", "blocks.1.attn"]
    assert [tile.layer for tile in recorded.tiles] == [0, 1, 0, 1]
    assert hooks.skipped == {}


def test_hooked_twice_in_a_row() -> None:
    model, x = small_vit(), images()
    with leaves_nothing(model):
        first, second = hooked(model, x), hooked(model, x)
    close(first[1].attention(), second[1].attention(), 0)
    assert [tile.layer for tile in second[1].tiles] == [0, 1]


@pytest.mark.parametrize("name", ["ours", "torchvision"])
def test_nested_contexts_both_get_all_tiles(name: str) -> None:
    model, x = FAMILIES[name].model(), FAMILIES[name].images()
    with torch.no_grad():
        untouched, expected = model(x), expected_attention(model, x)
        inner, outer = Assemble(), Assemble()
        with leaves_nothing(model), attention_hooks(model, outer) as outer_hooks:
            with attention_hooks(model, inner) as inner_hooks:
                close(model(x), untouched, 1e-5)
                inner_hooks.stop_after = 1
                with pytest.raises(ForwardStopped):
                    model(x)
            assert not torch.backends.mha.get_fastpath_enabled()
            close(model(x), untouched, 1e-5)
    for recorded in (inner, outer):
        close(recorded.attention(), expected, 1e-6)
    assert len(inner.tiles) == 4
    assert len(outer.tiles) == 6
    assert inner_hooks.layers == outer_hooks.layers


def test_nested_contexts_of_two_models() -> None:
    one, other = small_vit(), small_vit(depth=3)
    with attention_hooks(one, first := Assemble()), attention_hooks(other, second := Assemble()):
        one(images())
        other(images())
    assert (sorted(first.layers), sorted(second.layers)) == ([0, 1], [0, 1, 2])


# Stopping early


def test_stop_after_shows_the_layer_and_ends_the_pass() -> None:
    model, x, recorded = small_vit(depth=3), images(), Assemble()
    calls: list[str] = []
    for name in ("blocks.1.mlp", "blocks.0.mlp", "norm"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    with attention_hooks(model, recorded) as hooks:
        hooks.stop_after = 1
        for _ in range(2):
            with pytest.raises(ForwardStopped):
                model(x)
        assert sorted(recorded.layers) == [0, 1]
        assert calls == ["blocks.0.mlp"] * 2
        with pytest.raises(ForwardStopped):
            model.forward_features(x)
        assert hooks.layers == ["blocks.0.attn", "blocks.1.attn"]
        hooks.stop_after = None
        model(x)
    assert calls[3:] == ["blocks.0.mlp", "blocks.1.mlp", "norm"]
    close(recorded.attention(), expected_attention(model, x), 1e-6)


def test_a_model_cannot_swallow_the_stop() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_vit()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.inner(x)
            except Exception:
                return x

    model = Careful()
    with attention_hooks(model) as hooks:
        hooks.stop_after = 0
        with pytest.raises(ForwardStopped):
            model(images())
    assert not issubclass(ForwardStopped, Exception)


# Errors


def test_attention_that_cannot_be_captured_raises_with_the_remedy() -> None:
    model = FAMILIES["timm"].model()
    for block in model.blocks:
        block.attn.fused_attn, block.attn.attn_drop = False, nn.Threshold(0.1, 0.0)
    with leaves_nothing(model), pytest.raises(InputError, match=type(model).__name__) as error, attention_hooks(model):
        model(images(32, 48))
    assert 'set_attn_implementation("sdpa")' in str(error.value)
    assert "timm.layers.set_fused_attn(True, experimental=True)" in str(error.value)


def test_the_error_lists_other_attention() -> None:
    from timm.models.xcit import Xcit

    model = Xcit(img_size=32, patch_size=16, embed_dim=16, depth=1, cls_attn_layers=1, num_heads=2).eval()
    with (
        pytest.raises(
            InputError,
            match=r"other attention: blocks.0.attn \(attention between channels.*cls_attn_blocks.0.attn \(1 query for 5 keys\)",
        ),
        attention_hooks(model),
    ):
        model(images(32, 32))


def test_no_error_if_the_model_was_not_called() -> None:
    with attention_hooks(small_vit()) as hooks:
        pass
    assert hooks.layers == []


def test_the_models_own_error_is_not_hidden() -> None:
    model = small_vit()
    with pytest.raises(InputError, match="divide into patches"), attention_hooks(model):
        model(images(25, 24))


@pytest.mark.parametrize("tile_bytes", [0, -5])
def test_tile_bytes_must_be_positive(tile_bytes: int) -> None:
    with pytest.raises(InputError, match=f"tile_bytes must be a positive number, got {tile_bytes}"), attention_hooks(
        small_vit(), tile_bytes=tile_bytes
    ):  # fmt: skip
        pass
