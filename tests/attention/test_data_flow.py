"""Layers that do not run one after the other are refused; those that do never are, whatever their weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tests.example_models import FAMILIES, branches_side_by_side, images
from vit_probe import InputError, attention_rollout, mean_attention_distance
from vit_probe.attention.data_flow import DataFlow
from vit_probe.tokens.locate import locate_tokens

WIDTH = 16


class Attention(nn.Module):
    def __init__(self, attend: Callable[..., Tensor] = F.scaled_dot_product_attention) -> None:
        super().__init__()
        self.qkv, self.proj, self.attend = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=2)
        return self.proj(rearrange(self.attend(q, k, v), "b h n d -> b n (h d)"))


class Model(nn.Module):
    """A patch embedding of 8 x 8 pixels, and `through`, which applies the layers."""

    def __init__(self, *layers: nn.Module, through: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.layers = nn.Conv2d(3, WIDTH, 8, 8), nn.ModuleList(layers)
        self.through = through or one_after_the_other
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.through(self.patches(x).flatten(2).mT, *self.layers)


def one_after_the_other(x: Tensor, *layers: nn.Module) -> Tensor:
    for layer in layers:
        x = x + layer(x)
    return x


def per_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = zip(q.split(1, dim=1), k.split(1, dim=1), v.split(1, dim=1), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*head) for head in heads], dim=1)


def difference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v) - 0.5 * F.scaled_dot_product_attention(k, q, v)


def difference_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    output = torch.empty_like(v)
    output[:] = F.scaled_dot_product_attention(q, k, v)
    output -= F.scaled_dot_product_attention(k, q, v)
    return output


def difference_of_softmaxes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(dim=-1) @ v - 0.5 * ((k @ q.mT).softmax(dim=-1) @ v)


@pytest.mark.parametrize("attend", [per_head, difference, difference_in_place, difference_of_softmaxes])
def test_a_module_that_attends_twice_is_refused(attend: Callable[..., Tensor]) -> None:
    with pytest.raises(InputError, match=r"^layers.1 attends more than once .* its attention is not one softmax"):
        mean_attention_distance(Model(Attention(), Attention(attend)), images(32, 48), device="cpu")


def test_timms_parallel_branches_are_refused() -> None:
    message = "^blocks.0.attns.1.attn does not use the result of blocks.0.attns.0.attn: they attend side by side"
    for measure in (mean_attention_distance, attention_rollout):
        with pytest.raises(InputError, match=message):
            measure(branches_side_by_side(), images(), device="cpu")


def test_two_passes_that_are_averaged_are_refused() -> None:
    """As test-time augmentation makes them."""
    layers = Attention(), Attention()

    def both(x: Tensor, *layers: nn.Module) -> Tensor:
        return one_after_the_other(x, *layers) + one_after_the_other(2 * x, *layers)

    with pytest.raises(InputError, match=r"^layers.0 does not use the result of layers.1"):
        locate_tokens(Model(*layers, through=both), 32, 48)


class LayerScale(nn.Module):
    def __init__(self, layer: nn.Module, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, nn.Parameter(torch.full((WIDTH,), scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer(x)


def zero_projection() -> Attention:
    layer = Attention()
    nn.init.zeros_(layer.proj.weight)
    return layer


def functional(x: Tensor, *layers: nn.Module) -> Tensor:
    """A model that calls the fused attention of all its layers itself, in one forward pass."""
    for _ in range(3):
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
    return x


def in_place(x: Tensor, *layers: nn.Module) -> Tensor:
    for layer in layers:
        x += layer(x)
    return x


def recurrent(x: Tensor, *layers: nn.Module) -> Tensor:
    return one_after_the_other(x, *layers, *layers)


@torch.no_grad()
def without_gradients(x: Tensor, *layers: nn.Module) -> Tensor:
    return one_after_the_other(x, *layers).detach().clone()


def through_numpy(x: Tensor, *layers: nn.Module) -> Tensor:
    """What leaves torch cannot be followed, and is not refused for that."""
    for layer in layers:
        x = x + torch.from_numpy(layer(x).numpy().copy())
        x = torch.from_numpy(x.numpy().copy())
    return x


@torch.jit.script
def double(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y += 2 * x
    return y


def scripted(x: Tensor, *layers: nn.Module) -> Tensor:
    return layers[1](double(layers[0](x)))


def reversible(x: Tensor, *layers: nn.Module) -> Tensor:
    one, other = x, x
    for layer in layers:
        one = one + layer(other)
        other = other + torch.tanh(one)
    return one + other


HONEST: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Model(Attention(), Attention()),
    "LayerScale of 1e-30": lambda: Model(*(LayerScale(Attention(), 1e-30) for _ in range(2))),
    "LayerScale of 0": lambda: Model(*(LayerScale(Attention(), 0.0) for _ in range(2))),
    "zero output projections": lambda: Model(zero_projection(), zero_projection()),
    "bfloat16": lambda: Model(LayerScale(Attention(), 1e-5), Attention()).bfloat16(),
    "functional": lambda: Model(through=functional),
    "in place": lambda: Model(Attention(), Attention(), through=in_place),
    "recurrent": lambda: Model(Attention(), through=recurrent),
    "without gradients": lambda: Model(Attention(), Attention(), through=without_gradients),
    "through NumPy": lambda: Model(Attention(), Attention(), through=through_numpy),
    "reversible": lambda: Model(Attention(), Attention(), Attention(), through=reversible),
    "softmax": lambda: Model(*(Attention(lambda q, k, v: (q @ k.mT).softmax(-1) @ v) for _ in range(2))),
    "scripted": lambda: Model(Attention(), Attention(), through=scripted),
    "nn.MultiheadAttention": FAMILIES["encoder"].model,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", HONEST)
def test_layers_one_after_the_other_are_not_refused(name: str) -> None:
    layout = locate_tokens(HONEST[name](), 32, 48)
    assert len(layout.layers) == {"functional": 3, "reversible": 3}.get(name, 2)


def test_memory_that_is_used_again_is_not_taken_for_what_was_in_it() -> None:
    with DataFlow() as flow:
        for _ in range(50):
            marked = flow.mark(torch.zeros(1000), "first")
            del marked
            assert flow.origins(torch.ones(1000)) == frozenset()


def test_views_and_what_is_written_to_them() -> None:
    with DataFlow() as flow:
        marked, plain = flow.mark(torch.ones(4), "marked"), torch.zeros(2, 4)
        assert flow.origins(plain) == frozenset()
        plain[1] = marked[:1]
        assert flow.origins(plain[0]) == flow.origins(plain.sum()) == {"marked"}
        assert flow.origins(torch.zeros(3).to_sparse()) == frozenset()
