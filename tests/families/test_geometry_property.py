"""A generic Vision Transformer of any shape: its grid is found, and where its tokens lie otherwise it is refused."""

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
from vit_probe.tokens.locate import find_token_grid, locate_tokens


class Generic(nn.Module):
    """A convolution, learned prefix tokens and one fused attention; subclasses arrange the tokens otherwise."""

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
        """(image, dim, row, col) and (image, token, dim) to (image, token, dim)."""
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
    rest=st.tuples(st.integers(0, 11), st.integers(0, 11)),
    named=st.booleans(),
)
def test_the_grid_of_any_shape_is_found(
    rows: int, cols: int, prefix: int, patch: tuple[int, int], rest: tuple[int, int], named: bool
) -> None:
    model = Generic(patch, prefix, named=named)
    height, width = (
        rows * patch[0] + rest[0] % patch[0],
        cols * patch[1] + rest[1] % patch[1],
    )  # the convolution leaves the rest
    found = find_token_grid(model, height, width)
    assert found == TokenGrid(rows, cols, patch, prefix, has_cls_token=named and prefix > 0)


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


class OneDropped(Generic):
    def arrange(self, patches: Tensor, prefix: Tensor) -> Tensor:
        return super().arrange(patches, prefix)[:, :-1]


class RowDropped(Generic):
    def arrange(self, patches: Tensor, prefix: Tensor) -> Tensor:
        return super().arrange(patches[:, :, 1:], prefix)


class OneTwice(Generic):
    def arrange(self, patches: Tensor, prefix: Tensor) -> Tensor:
        tokens = super().arrange(patches, prefix)
        return torch.cat([tokens, tokens[:, -1:]], dim=1)


class OneInPlaceOfAnother(Generic):
    def arrange(self, patches: Tensor, prefix: Tensor) -> Tensor:
        tokens = super().arrange(patches, prefix)
        return torch.cat([tokens[:, :-1], tokens[:, -2:-1]], dim=1)


OTHERWISE = [
    PrefixLast,
    PrefixAround,
    ColumnByColumn,
    UpsideDown,
    Shuffled,
    OneDropped,
    RowDropped,
    OneTwice,
    OneInPlaceOfAnother,
]


@pytest.mark.parametrize("size", [(32, 48), (32, 32)])
@pytest.mark.parametrize("arranged", OTHERWISE)
def test_tokens_that_lie_otherwise_are_refused(arranged: type[Generic], size: tuple[int, int]) -> None:
    with pytest.raises(InputError):
        find_token_grid(arranged(prefix=2), *size)


@pytest.mark.parametrize("size", [(32, 48), (32, 32)])
@pytest.mark.parametrize("arranged", OTHERWISE)
def test_nor_does_a_given_grid_help(arranged: type[Generic], size: tuple[int, int]) -> None:
    grid = TokenGrid(size[0] // 8, size[1] // 8, (8, 8), 2, True)
    with pytest.raises(InputError):
        locate_tokens(arranged(prefix=2), *size, grid=grid)


@pytest.mark.parametrize(
    ("convolution", "named"),
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
def test_overlapping_patches_whose_number_is_another_are_refused(convolution: dict[str, Any], named: int | None) -> None:
    model = Generic((8, 8), **convolution)
    if named:
        model.config = SimpleNamespace(patch_size=named)
    with pytest.raises(InputError):
        find_token_grid(model, 32, 48)


def test_overlapping_patches_in_the_middle_of_a_whole_grid_are_found() -> None:
    model = Generic((8, 8), stride=4, padding=2)
    model.config = SimpleNamespace(patch_size=4)
    assert find_token_grid(model, 32, 48) == TokenGrid(8, 12, (4, 4), 1, True)


class TwoLayers(Encoder):
    """Rearranges the tokens between two layers."""

    def forward(self, images: Tensor) -> Tensor:
        first, second = self.encoder.layers
        x = first(self.tokens(images))
        return second(self.between(x, images.shape[2] // 8))

    def between(self, x: Tensor, rows: int) -> Tensor:
        raise NotImplementedError


class ColumnsLater(TwoLayers):
    def between(self, x: Tensor, rows: int) -> Tensor:
        return x.unflatten(1, (rows, -1)).transpose(1, 2).flatten(1, 2)


class QueriesLater(TwoLayers):
    """As a detector does: as many learned queries as there are patches, which look at each other."""

    def between(self, x: Tensor, rows: int) -> Tensor:
        return self.rows.expand(-1, 8, -1).flatten(0, 1)[: x.shape[1]].expand(len(x), -1, -1) + 0 * x


@pytest.mark.parametrize("arranged", [ColumnsLater, QueriesLater])
def test_tokens_that_lie_otherwise_in_a_later_layer_are_refused(arranged: type[TwoLayers]) -> None:
    with pytest.raises(InputError, match=r"layer 1 .* does not have its tokens as TokenGrid"):
        find_token_grid(randomize(arranged()), 32, 48)
