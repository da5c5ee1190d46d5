"""Attention in a model's own code: seen at its softmax where that is what multiplies the values, and nowhere else."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tests.attention.test_hooks import leaves_nothing
from tests.checkpoints.parity import randomize
from tests.example_models import Assemble, images, swin, transformers_vit
from tests.reference import softmax_attention
from vit_probe import InputError, attention_hooks, attention_rollout, mean_attention_distance
from vit_probe.attention.intercept import ForwardStopped
from vit_probe.measures.class_attention import class_attention
from vit_probe.tokens.locate import locate_tokens

HEADS, WIDTH = 2, 16


class Attention(nn.Module):
    """Attention over patches; `attend` computes it from queries, keys and values (image, head, token, dim)."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout, self.softmax = nn.Dropout(0.3), nn.Softmax(dim=-1)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=HEADS)
        self.scores = (q @ k.mT * q.shape[-1] ** -0.5).detach()
        return self.proj(rearrange(self.attend(self, q, k, v), "b h n d -> b n (h d)"))


class Model(nn.Module):
    """A patch embedding of 8 x 8 pixels, and two layers of attention with a residual connection."""

    def __init__(self, attend: Callable[..., Tensor], attend_too: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.position = nn.Parameter(torch.randn(1, 24, WIDTH))
        self.layers = nn.ModuleList([Attention(attend), Attention(attend_too or attend)])
        for layer in self.layers:
            nn.init.normal_(layer.qkv.weight, std=0.5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT + self.position
        for layer in self.layers:
            x = x + layer(x)
        return x

    def expected(self) -> np.ndarray:
        """(layer, image, head, query, key) of the last forward pass, from the scores."""
        return np.stack([layer.scores.double().softmax(dim=-1).numpy() for layer in self.layers])


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5


def fold(*tensors: Tensor) -> list[Tensor]:
    return [tensor.flatten(0, 1) for tensor in tensors]


def in_half_precision(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(scores(q, k), dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.5, training=self.training), v)


def fold_before(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = fold(q, k, v)
    return torch.bmm(torch.bmm(q * q.shape[-1] ** -0.5, k.mT).softmax(dim=-1), v).unflatten(0, (-1, HEADS))


def fold_after(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).softmax(-1)
    return torch.bmm(weights.view(-1, *weights.shape[2:]), v.flatten(0, 1)).unflatten(0, (-1, HEADS))


def values_first(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v = rearrange(v, "b h j d -> b j h d")
    return rearrange(torch.einsum("bjhd,bhij->bihd", v, scores(q, k).softmax(-1)), "b i h d -> b h i d")


def as_modules(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return self.dropout(self.softmax(scores(q, k))) @ v


def minus_the_largest(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = scores(q, k)
    return (x - x.amax(dim=-1, keepdim=True)).softmax(dim=-1) @ v


SEEN: dict[str, Callable[..., Tensor]] = {
    "minus the largest": minus_the_largest,
    "method": lambda self, q, k, v: scores(q, k).softmax(dim=-1) @ v,
    "function": lambda self, q, k, v: torch.matmul(torch.softmax(scores(q, k), 3), v),
    "modules": as_modules,
    "transformers": in_half_precision,
    "einsum": lambda self, q, k, v: torch.einsum("b h i j, b h j d -> b h i d", scores(q, k).softmax(-1), v),
    "values first": values_first,
    "folded before": fold_before,
    "folded after": fold_after,
    "operator": lambda self, q, k, v: torch.ops.aten.softmax.int(scores(q, k), -1) @ v,
}


@pytest.mark.parametrize(("name", "tile_bytes"), [*((name, 4 << 20) for name in SEEN), ("method", 1)])
def test_attention_is_seen_and_the_output_is_the_models_own(name: str, tile_bytes: int) -> None:
    model, x = Model(SEEN[name]), images(32, 48, batch=2)
    with torch.no_grad(), leaves_nothing(model):
        untouched = model(x)
        with attention_hooks(model, recorded := Assemble(), tile_bytes=tile_bytes, verify=True) as hooks:
            result = model(x)
    assert torch.equal(result, untouched)
    assert hooks.layers == hooks.unfused == ["layers.0", "layers.1"]
    assert hooks.skipped == {}
    assert model.expected().max(-1).mean() > 3 / 24  # far from uniform
    np.testing.assert_allclose(recorded.attention(), model.expected(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["modules", "folded before", "values first"])
def test_tokens_are_placed_as_with_fused_attention(name: str) -> None:
    layout = locate_tokens(Model(SEEN[name]), 32, 48)
    assert (layout.grid.rows, layout.grid.cols, layout.grid.num_tokens) == (4, 6, 24)
    assert (layout.layers, layout.unfused, layout.skipped) == (["layers.0", "layers.1"], ["layers.0", "layers.1"], {})


def subtract(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k).softmax(-1) - 0.5 * scores(k, q).softmax(-1)) @ v


def mix_heads(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed = torch.einsum("b h i j, h g -> b g i j", scores(q, k).softmax(-1), torch.eye(HEADS).roll(1, 0) + 0.1)
    return torch.einsum("b h i j, b h j d -> b h i d", mixed, v)


def mask_in_place(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).softmax(-1)
    weights[..., :3] = 0
    return weights @ v


NOT_SEEN: dict[str, Callable[..., Tensor]] = {
    "two softmaxes subtracted": subtract,
    "heads mixed": mix_heads,
    "normalised again": lambda self, q, k, v: F.normalize(scores(q, k).softmax(-1), p=1, dim=-2) @ v,
    "masked after": lambda self, q, k, v: scores(q, k).softmax(-1).tril() @ v,
    "masked in place": mask_in_place,
    "gated": lambda self, q, k, v: (torch.sigmoid(q[..., :1]) * scores(q, k).softmax(-1)) @ v,
    "transposed": lambda self, q, k, v: scores(q, k).softmax(-1).mT @ v,
    "over queries": lambda self, q, k, v: scores(q, k).softmax(dim=-2) @ v,
    "logarithm": lambda self, q, k, v: scores(q, k).log_softmax(dim=-1) @ v,
    "sigmoid": lambda self, q, k, v: scores(q, k).sigmoid() @ v,
    "exponential": lambda self, q, k, v: ((e := scores(q, k).exp()) / e.sum(-1, keepdim=True)) @ v,
    "over channels": lambda self, q, k, v: (scores(q.mT, k.mT).softmax(-1) @ v.mT).mT,
    "windows apart": lambda self, q, k, v: (scores(q[None], k[None]).softmax(-1) @ v[None])[0],
    "fewer keys": lambda self, q, k, v: scores(q, k[:, :, :8]).softmax(-1) @ v[:, :, :8],
}


@pytest.mark.parametrize("name", NOT_SEEN)
@pytest.mark.parametrize("alone", [True, False])
def test_other_attention_is_refused_or_named(name: str, alone: bool) -> None:
    """Alone, or in one layer of a class of its own while another layer is seen."""

    class OtherAttention(Attention):
        pass

    model, x = Model(NOT_SEEN[name], SEEN["method"]), images(32, 48, batch=2)
    if alone:
        model.layers[1].attend = NOT_SEEN[name]
    model.layers[1].__class__ = Attention if alone else OtherAttention
    with torch.no_grad():
        untouched = model(x)
        refused = pytest.raises(InputError, match=r"no self-attention could be captured \(other attention: layers.0 \(")
        with refused if alone else nullcontext(), attention_hooks(model, recorded := Assemble()) as hooks:
            result = model(x)
    assert torch.equal(result, untouched)
    assert (hooks.layers, hooks.unfused) == (([], []) if alone else (["layers.1"], ["layers.1"]))
    assert list(hooks.skipped) == (["layers.0", "layers.1"] if alone else ["layers.0"])
    assert set(recorded.layers) == (set() if alone else {0})


def test_a_layer_of_the_same_class_that_is_not_seen_is_an_error() -> None:
    model = Model(SEEN["method"], subtract)
    with pytest.raises(InputError, match=r"attention of 1 module of Model could not be captured \(layers.1\)"):
        locate_tokens(model, 32, 48)


def test_queries_of_other_patches_are_refused() -> None:
    """As cross-attention has them, whose maps have one row per query, too."""
    with pytest.raises(InputError, match="layer 0"):
        locate_tokens(Model(lambda self, q, k, v: scores(q.flip(2), k).softmax(-1) @ v), 32, 48)
    with pytest.raises(InputError, match="layer 0"):
        locate_tokens(Model(lambda self, q, k, v: scores(q, k.flip(2)).softmax(-1) @ v.flip(2)), 32, 48)


def test_slots_that_are_as_many_as_tokens_are_refused() -> None:
    """A soft mixture of experts weighs slots, which are no tokens, by a softmax that multiplies what the slots hold."""

    class Slots(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slots = nn.Parameter(torch.randn(WIDTH, 24))

        def forward(self, x: Tensor) -> Tensor:
            logits = x @ self.slots
            return logits.softmax(dim=-1) @ (logits.softmax(dim=1).mT @ x)

    model = Model(SEEN["method"])
    model.layers.append(Slots())
    with pytest.raises(InputError, match="layer 2"):
        locate_tokens(model, 32, 48)


@pytest.mark.parametrize("grad", [True, False])
def test_dropout_and_gradients_are_those_without_hooks(grad: bool) -> None:
    model, x = Model(as_modules).train(), images(32, 48, batch=2)
    with torch.set_grad_enabled(grad):
        torch.manual_seed(1)
        untouched = model(x)
        torch.manual_seed(1)
        with attention_hooks(model, recorded := Assemble()):
            result = model(x)
    assert torch.equal(result, untouched)
    np.testing.assert_allclose(recorded.attention(), model.expected(), rtol=0, atol=1e-6)  # before dropout
    if grad:
        ours, theirs = (torch.autograd.grad(y.sin().sum(), list(model.parameters())) for y in (result, untouched))
        assert all(map(torch.equal, ours, theirs))


def test_autocast_and_half_precision() -> None:
    model, x = Model(SEEN["method"]), images(32, 48, batch=2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        untouched = model(x)
        with attention_hooks(model, recorded := Assemble(), verify=True):
            assert torch.equal(model(x), untouched)
    np.testing.assert_allclose(recorded.attention().sum(-1), 1, rtol=0, atol=1e-5)
    model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    with torch.no_grad(), attention_hooks(model, recorded := Assemble(), verify=True):
        model(x)
    np.testing.assert_allclose(recorded.attention(), model.expected(), rtol=0, atol=1e-2)


def test_nested_contexts_and_stopping() -> None:
    model, x = Model(as_modules), images(32, 48, batch=2)
    with torch.no_grad(), attention_hooks(model, outer := Assemble()), attention_hooks(model, inner := Assemble()) as hooks:
        model(x)
        hooks.stop_after = 0
        with pytest.raises(ForwardStopped):
            model(x)
    np.testing.assert_allclose(outer.attention(), model.expected(), rtol=0, atol=1e-6)
    assert [len(one.tiles) for one in (outer, inner)] == [3, 3]


def test_no_map_is_kept_alive() -> None:
    maps: list[weakref.ref[Tensor]] = []

    def attend(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = scores(q, k).softmax(-1)
        maps.append(weakref.ref(weights))
        return (weights if self.training else weights.clone()) @ v

    model = Model(attend, lambda self, *qkv: 2 * attend(self, *qkv))
    with torch.no_grad(), attention_hooks(model, Assemble()):
        model(images(32, 48, batch=2))
        assert [one() for one in maps] == [None, None]


def test_products_as_modules_belong_to_the_attention_around_them() -> None:
    class MatMul(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a @ b

    def attend(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.second(self.softmax(self.first(q, k.mT) * q.shape[-1] ** -0.5), v)

    model = Model(attend)
    for layer in model.layers:
        layer.first, layer.second = MatMul(), MatMul()
    with torch.no_grad(), attention_hooks(model, recorded := Assemble()) as hooks:
        model(images(32, 48, batch=2))
    assert hooks.layers == ["layers.0", "layers.1"]
    np.testing.assert_allclose(recorded.attention(), model.expected(), rtol=0, atol=1e-6)


# Libraries: without fused attention, all measures are what they are with it


def without_fusing(model: nn.Module) -> nn.Module:
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("measure", [attention_rollout, class_attention])
def test_maps_of_transformers_eager(measure: Any) -> None:
    model, x = randomize(transformers_vit("ViT", image_size=16)), images(16, 16)
    fused = measure(model, x, batch_size=2, device="cpu")
    unfused = measure(without_fusing(model), x, batch_size=2, device="cpu")
    assert (fused.provenance["unfused"], unfused.provenance["unfused"]) == ([], fused.provenance["layers"])
    np.testing.assert_allclose(unfused.maps, fused.maps, rtol=0, atol=1e-6)


def test_rows_of_transformers_eager_windows() -> None:
    fused, unfused = (
        mean_attention_distance(model, images(48, 48, batch=1), device="cpu").to_dataframe()
        for model in (swin(), without_fusing(swin()))
    )
    pd.testing.assert_frame_equal(unfused, fused, check_exact=False, atol=1e-4)
    assert (fused.attrs["unfused"], unfused.attrs["unfused"]) == ([], list(fused.module.unique()))


def test_attention_reference() -> None:
    """The scores that the tests record give the attention of the slow reference."""
    model, x = Model(SEEN["method"]), images(32, 48, batch=2)
    with torch.no_grad():
        q, k, _ = rearrange(
            model.layers[0].qkv(model.patches(x).flatten(2).mT + model.position), "b n (qkv h d) -> qkv b h n d", qkv=3, h=HEADS
        )
        model(x)
    np.testing.assert_allclose(model.expected()[0], softmax_attention(q, k, 8**-0.5), rtol=0, atol=1e-6)


def _in_place(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).softmax(dim=-1)
    weights *= torch.linspace(0.1, 1, weights.shape[-1])
    return weights @ v


def _behind_autograd(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).softmax(dim=-1)
    weights.data.mul_(torch.linspace(0.1, 1, weights.shape[-1]))
    return weights @ v


def _overwritten_scores(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = scores(q, k)
    weights = x.softmax(dim=-1)
    x.zero_()
    return weights @ v


@pytest.mark.parametrize("attend", [_in_place, _behind_autograd, _overwritten_scores])
@pytest.mark.parametrize("inference", [False, True])
def test_what_is_written_to_the_weights_or_the_scores_is_noticed(attend: Callable[..., Tensor], inference: bool) -> None:
    with torch.inference_mode(inference), pytest.raises(InputError, match="no self-attention could be captured"):
        mean_attention_distance(Model(attend), images(32, 48))


def test_weights_that_multiply_twice_are_refused() -> None:
    def attend(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = scores(q, k).softmax(dim=-1)
        return weights @ (weights @ v)

    with pytest.raises(InputError, match="multiplies the same softmax twice"):
        mean_attention_distance(Model(attend), images(32, 48))
