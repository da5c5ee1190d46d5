"""`locate_tokens` finds the grid of a generic Vision Transformer of any shape, and rejects any other order of its tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.checkpoints.parity import randomize
from tests.families.torch import Encoder
from vit_probe import InputError, TokenGrid
from vit_probe.tokens.locate import locate_tokens


class Generic(nn.Module):
    """A convolution, learned prefix tokens and one fused attention; subclasses arrange the tokens in another order."""

    def __init__(
        self, patch_size: tuple[int, int] = (8, 8), prefix: int = 1, *, named: bool = True, **convolution: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Conv2d(3, 8, patch_size, **(dict(stride=patch_size) | convolution))
        self.qkv = nn.Linear(8, 24)
        tokens = nn.Parameter(torch.randn(1, prefix, 8))
        self.register_parameter("cls_token" if named else "prefix", tokens)
        self.named = named

    def arrange(self, patches: Tensor, prefix: Tensor) -> Tensor:
        """Combine patches (image, dim, row, col) and prefix tokens (image, token, dim) to tokens (image, token, dim)."""
        return torch.cat([prefix, patches.flatten(2).mT], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        prefix = self.cls_token if self.named else self.prefix
        tokens = self.arrange(self.proj(images), prefix.expand(len(images), -1, -1))
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(tokens).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 9),
    prefix=st.integers(0, 5),
    patch=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    remainder=st.tuples(st.integers(0, 11), st.integers(0, 11)),
    named=st.booleans(),
)
def test_the_grid_of_any_shape_is_found(
    rows: int, cols: int, prefix: int, patch: tuple[int, int], remainder: tuple[int, int], named: bool
) -> None:
    model = Generic(patch, prefix, named=named)
    # The convolution ignores an incomplete patch at the edge.
    height, width = rows * patch[0] + remainder[0] % patch[0], cols * patch[1] + remainder[1] % patch[1]
    grid = locate_tokens(model, height, width).grid
    # Its output holds all tokens, so only the name of a single prefix token can tell that it is the class token.
    has_cls_token = False if prefix == 0 else True if named and prefix == 1 else None
    assert grid == TokenGrid(rows, cols, patch, prefix, has_cls_token)


class PrefixLast(Generic):
    def arrange(self, patches: Tensor, prefix: Tensor) -> Tensor:
        return torch.cat([patches.flatten(2).mT, prefix], dim=1)


class PrefixAround(Generic):
    def arrange(self, patches: Tensor, prefix: Tensor) -> Tensor:
        return torch.cat([prefix[:, :1], patches.flatten(2).mT, prefix[:, 1:]], dim=1)


class ColumnByColumn(Generic):
    def arrange(self, patches: Tensor, prefix: Tensor) -> Tensor:
        return super().arrange(patches.transpose(2, 3), prefix)


class UpsideDown(Generic):
    def arrange(self, patches: Tensor, prefix: Tensor) -> Tensor:
        return super().arrange(patches.flip(2), prefix)


class Shuffled(Generic):
    def arrange(self, patches: Tensor, prefix: Tensor) -> Tensor:
        order = torch.randperm(patches[0, 0].numel(), generator=torch.Generator().manual_seed(1))
        return torch.cat([prefix, patches.flatten(2).mT[:, order]], dim=1)


class LastPatchDropped(Generic):
    def arrange(self, patches: Tensor, prefix: Tensor) -> Tensor:
        return super().arrange(patches, prefix)[:, :-1]


class FirstRowDropped(Generic):
    def arrange(self, patches: Tensor, prefix: Tensor) -> Tensor:
        return super().arrange(patches[:, :, 1:], prefix)


class LastPatchRepeated(Generic):
    def arrange(self, patches: Tensor, prefix: Tensor) -> Tensor:
        tokens = super().arrange(patches, prefix)
        return torch.cat([tokens, tokens[:, -1:]], dim=1)


class LastPatchReplaced(Generic):
    def arrange(self, patches: Tensor, prefix: Tensor) -> Tensor:
        tokens = super().arrange(patches, prefix)
        return torch.cat([tokens[:, :-1], tokens[:, -2:-1]], dim=1)


@pytest.mark.parametrize(("model_class", "before", "behind"), [(PrefixLast, 0, 3), (PrefixAround, 1, 2)])
def test_tokens_behind_the_patches_are_neither_prefix_nor_patches(model_class: type[Generic], before: int, behind: int) -> None:
    grid = locate_tokens(model_class(prefix=3, named=False), 32, 48).grid
    assert grid == TokenGrid(4, 6, (8, 8), before, None, num_suffix_tokens=behind)


OTHER_ORDERS = [
    ColumnByColumn,
    UpsideDown,
    Shuffled,
    LastPatchDropped,
    FirstRowDropped,
    LastPatchRepeated,
    LastPatchReplaced,
]


@pytest.mark.parametrize("size", [(32, 48), (32, 32)])
@pytest.mark.parametrize("model_class", OTHER_ORDERS)
def test_other_orders_of_tokens_are_rejected(model_class: type[Generic], size: tuple[int, int]) -> None:
    with pytest.raises(InputError):
        locate_tokens(model_class(prefix=2), *size)


@pytest.mark.parametrize("size", [(32, 48), (32, 32)])
@pytest.mark.parametrize("model_class", [*OTHER_ORDERS, PrefixLast, PrefixAround])
def test_other_orders_are_rejected_with_a_given_grid_too(model_class: type[Generic], size: tuple[int, int]) -> None:
    grid = TokenGrid(size[0] // 8, size[1] // 8, (8, 8), 2, True)
    with pytest.raises(InputError):
        locate_tokens(model_class(prefix=2), *size, grid=grid)


@pytest.mark.parametrize(
    ("convolution", "stated_patch_size"),
    [
        (dict(stride=4), None),
        (dict(stride=4), 8),
        (dict(stride=4), 4),
        (dict(stride=4, padding=2), None),
        (dict(stride=4, padding=2), 8),
        (dict(stride=(8, 4)), None),
        (dict(stride=(8, 4)), 8),
    ],
)
def test_overlapping_patches_that_do_not_tile_the_image_are_rejected(
    convolution: dict[str, Any], stated_patch_size: int | None
) -> None:
    model = Generic((8, 8), **convolution)
    if stated_patch_size:
        model.config = SimpleNamespace(patch_size=stated_patch_size)
    with pytest.raises(InputError):
        locate_tokens(model, 32, 48)


def test_overlapping_patches_centred_on_a_grid_are_located() -> None:
    model = Generic((8, 8), stride=4, padding=2)
    model.config = SimpleNamespace(patch_size=4)
    assert locate_tokens(model, 32, 48).grid == TokenGrid(8, 12, (4, 4), 1, True)


class TwoLayers(Encoder):
    """Rearranges the tokens between its two layers."""

    def forward(self, images: Tensor) -> Tensor:
        first, second = self.encoder.layers
        x = first(self.tokens(images))
        return second(self.between(x, images.shape[2] // 8))

    def between(self, x: Tensor, rows: int) -> Tensor:
        raise NotImplementedError


class ColumnByColumnLater(TwoLayers):
    def between(self, x: Tensor, rows: int) -> Tensor:
        return x.unflatten(1, (rows, -1)).transpose(1, 2).flatten(1, 2)


class LearnedQueriesLater(TwoLayers):
    """Like a detector: self-attention among learned queries, of which there are as many as patches."""

    def between(self, x: Tensor, rows: int) -> Tensor:
        return self.rows.expand(-1, 8, -1).flatten(0, 1)[: x.shape[1]].expand(len(x), -1, -1) + 0 * x


@pytest.mark.parametrize("model_class", [ColumnByColumnLater, LearnedQueriesLater])
def test_other_orders_in_a_later_layer_are_rejected(model_class: type[TwoLayers]) -> None:
    with pytest.raises(InputError, match=r"layer 1 .* does not order its tokens as TokenGrid"):
        locate_tokens(randomize(model_class()), 32, 48)
