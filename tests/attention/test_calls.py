"""What a self-attention call tells and computes by itself."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tests.attention.test_hooks import close, qkv
from vit_probe.attention.calls import AttentionCall, UnfusedCall


def test_the_output_of_a_call_is_that_of_the_fused_attention() -> None:
    q, k, v = qkv()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(AttentionCall(0, "", q, k, v, None, is_causal=True, scale=0.3).output(), expected)


def test_identity_attention_returns_the_values_of_each_head() -> None:
    q, k, v = qkv(heads=4, key_heads=2)
    close(AttentionCall(0, "", q, k, v, None, enable_gqa=True).identity_output(), v.repeat_interleave(2, dim=1), 0)


def test_what_a_softmax_tells_of_each_token() -> None:
    q, k, v = qkv()
    scores = q @ k.mT
    scores[:, :, 0, 0] = -torch.inf
    folded = scores.flatten(0, 1).softmax(dim=-1)
    none = q[..., :0]
    call = UnfusedCall(
        *(0, "", none, none, none, scores),
        product=lambda weights: (weights @ v.flatten(0, 1)).mT,
        weights=folded,
        values=v,
        to_tokens=lambda output: output.mT,
    )
    close(call.output(), (folded @ v.flatten(0, 1)).mT, 0)
    values, own_scores = call.token_vectors()
    close(values, v, 0)
    close(own_scores[:, :, 1:, 0], (q * k).sum(-1)[:, :, 1:], 1e-5)
    assert own_scores.isfinite().all()
