"""Families of models made of torch's own modules."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.families import multihead
from tests.families.family import Family, blocks


class Patches(nn.Module):
    """A patch embedding of 8 x 8 pixels with learned positions; subclasses add attention over the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 32, 8, 8)
        self.rows, self.cols = nn.Parameter(torch.zeros(8, 1, 32)), nn.Parameter(torch.zeros(1, 8, 32))

    def tokens(self, images: Tensor) -> Tensor:
        patches = self.proj(images).permute(0, 2, 3, 1)
        return (patches + self.rows[: patches.shape[1]] + self.cols[:, : patches.shape[2]]).flatten(1, 2)


def encoder_layer(**options: bool) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, **options)


class Encoder(Patches):
    """`nn.TransformerEncoder`, which has its own fast path."""

    def __init__(self, *, batch_first: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        layer = encoder_layer(batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.batch_first = batch_first

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        return self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)


class UsesAttentionWeights(Patches):
    """Uses the weights that `nn.MultiheadAttention` returns, per head or averaged over heads."""

    def __init__(self, *, average: bool) -> None:
        super().__init__()
        self.attention = nn.ModuleList(nn.MultiheadAttention(32, 2, batch_first=True) for _ in range(2))
        self.average = average

    def forward(self, images: Tensor) -> Tensor:
        x, scale = self.tokens(images), torch.zeros(())
        for attention in self.attention:
            mixed, weights = attention(x, x, x, need_weights=True, average_attn_weights=self.average)
            x, scale = x + mixed, scale + weights.square().sum((1, -1) if self.average else (1, 2, 3))
        return x * scale.view(len(x), -1, 1)[:, : x.shape[1]]


class Decoder(Patches):
    """An encoder layer, and a decoder layer with as many queries as keys."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder_layer(batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(32, 2, 64, dropout=0.0, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        x = self.encoder(self.tokens(images))
        return self.decoder(x, x)


class CrossAttention(nn.Module):
    """Fused attention from one sequence to another."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (
            linear(tokens).unflatten(-1, (2, 16)).transpose(1, 2)
            for linear, tokens in zip(self.qkv, (x, memory, memory), strict=True)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class EncoderWithCrossAttention(Patches):
    """Two encoder layers, and between them cross-attention from the patches to those of the vertically flipped image."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = encoder_layer(batch_first=True), encoder_layer(batch_first=True)
        self.cross = CrossAttention()

    def forward(self, images: Tensor) -> Tensor:
        x = self.before(self.tokens(images))
        return self.after(x + self.cross(x, self.tokens(images.flip(2))))


CROSS_ATTENTION = "the queries come from one sequence, the keys from another"
_torch = partial(
    Family,
    "torch",
    unfused=multihead.unfused,
    sizes=((32, 48), (40, 24), (48, 48)),
    num_prefix_tokens=0,
    has_cls_token=False,
)
_ENCODER = blocks("encoder.layers.{}.self_attn")
FAMILIES = [
    _torch("nn.TransformerEncoder", lambda size: Encoder(), layers=_ENCODER),
    _torch("nn.TransformerEncoder, norm_first", lambda size: Encoder(norm_first=True), layers=_ENCODER, in_readme=False),
    _torch("nn.TransformerEncoder, tokens first", lambda size: Encoder(batch_first=False), layers=_ENCODER, in_readme=False),
    _torch(
        "nn.TransformerEncoder, tokens first, norm_first",
        lambda size: Encoder(batch_first=False, norm_first=True),
        layers=_ENCODER,
        in_readme=False,
    ),
    _torch(
        "nn.MultiheadAttention with weights", lambda size: UsesAttentionWeights(average=False), layers=blocks("attention.{}")
    ),
    _torch(
        "nn.MultiheadAttention with mean weights",
        lambda size: UsesAttentionWeights(average=True),
        layers=blocks("attention.{}"),
        in_readme=False,
    ),
    _torch(
        "nn.TransformerDecoderLayer",
        lambda size: Decoder(),
        layers=("encoder.self_attn", "decoder.self_attn"),
        skipped={"decoder.multihead_attn": CROSS_ATTENTION},
        in_readme=False,
    ),
    _torch(
        "cross-attention by scaled_dot_product_attention",
        lambda size: EncoderWithCrossAttention(),
        layers=("before.self_attn", "after.self_attn"),
        skipped={"cross": CROSS_ATTENTION},
        in_readme=False,
    ),
]
