"""Attention that was never seen is named, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.example_models import FAMILIES, images, small_vit
from vit_probe import attention_hooks
from vit_probe.attention.projections import unmeasured_attention


class Holds(nn.Module):
    """A module with linear layers of the given names; a name with a dot is that of a parameter."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            if name.endswith("."):
                self.register_parameter(name[:-1], nn.Parameter(torch.zeros(2, 2)))
            else:
                self.add_module(name, nn.Linear(2, 2))


ATTENTION = [
    "qkv", "to_qkv", "qkv_proj", "Wqkv", "c_qkv", "query_key_value", "queries_keys_values", "qkvs", "in_proj_weight.",
    "q k v", "q_proj k_proj v_proj out_proj", "wq wk wv", "to_q to_kv", "q kv", "qk v", "query key value", "q_lin k_lin",
    "projection_query projection_key", "convolution_projection_query convolution_projection_key",
    "q_proj_weight. k_proj_weight.",
    "attn v", "q1 k1 q2 k2", "linear_q linear_k",
]  # fmt: skip
NO_ATTENTION = [
    "fc1 fc2", "proj norm", "q_norm k_norm", "keys", "value", "query_tokens", "v", "q", "attn", "key_padding_mask. proj",
    "k_bias. v_bias.", "pos_q pos_k rope", "quality kind",
]  # fmt: skip


@pytest.mark.parametrize("names", ATTENTION)
def test_names_of_projections(names: str) -> None:
    model = nn.ModuleDict({"a": Holds(*names.split()), "b": nn.Sequential(Holds(*names.split()))})
    found = unmeasured_attention(model, seen=set(), ran={"a"})
    assert list(found) == ["a", "b.0"]
    assert found["a"].startswith("its attention is not a softmax over all pairs of tokens")
    assert found["b.0"] == "it did not run"


@pytest.mark.parametrize("names", NO_ATTENTION)
def test_other_names(names: str) -> None:
    assert unmeasured_attention(Holds(*names.split()), seen=set(), ran={""}) == {}


def test_modules_inside_and_around_what_was_seen_are_not_named() -> None:
    inside = nn.ModuleDict({"attention": nn.ModuleDict({"self": Holds("query", "key", "value")}), "core": nn.Identity()})
    around = Holds("qkv")
    around.add_module("core", nn.Identity())
    model = nn.ModuleDict({"inside": inside, "around": around, "other": Holds("qkv"), "other2": Holds("qkv")})
    assert list(unmeasured_attention(model, seen={"inside", "around.core", "other"}, ran=set())) == ["other2"]
    assert unmeasured_attention(model, seen={""}, ran=set()) == {}


@pytest.mark.parametrize("name", ["ours", "timm", "timm-eva02", "timm-beit", "transformers-vit", "torchvision", "encoder"])
def test_nothing_is_named_where_all_attention_is_seen(name: str) -> None:
    model = FAMILIES[name].model()
    with torch.no_grad(), attention_hooks(model) as hooks:
        model(FAMILIES[name].images())
    assert hooks.skipped == {}


def test_volo() -> None:
    """Outlook attention has a softmax over 3 x 3 neighbours, class attention a single query."""
    from timm.models.volo import VOLO

    sizes = dict(layers=(1, 1, 0, 0), embed_dims=(16, 32, 32, 32), num_heads=(2, 2, 2, 2), stem_hidden_dim=8)
    model = VOLO(img_size=32, num_classes=3, **sizes).eval()
    with torch.no_grad(), attention_hooks(model) as hooks:
        model(images(32, 32))
    assert hooks.layers == ["network.2.0.attn"]
    assert list(hooks.skipped) == ["network.0.0.attn", "post_network.0.attn", "post_network.1.attn"]
    assert hooks.skipped["network.0.0.attn"].startswith("attention of shape (3, 2, 4, 9, 9)")
    assert hooks.skipped["post_network.0.attn"] == "1 query for 5 keys"


def test_attention_that_did_not_run_or_needs_no_softmax() -> None:
    class Linear(Holds):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(small_vit(num_classes=0), Linear("q", "k"))
    model.add_module("decoder", nn.MultiheadAttention(4, 2))
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    with attention_hooks(model) as hooks:
        model(images())
    assert list(hooks.skipped) == ["1", "decoder"]
    assert hooks.skipped["decoder"] == "it did not run"
