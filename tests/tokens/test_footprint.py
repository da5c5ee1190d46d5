"""Tokens behind stems that mix patches: honest orders are accepted, any other is refused."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_probe import InputError, TokenGrid
from vit_probe.tokens.footprint import CellResponses, mixing_gains
from vit_probe.tokens.identity_attention import IdentityAttentionProbe
from vit_probe.tokens.locate import locate_tokens


def _plain(dim: int) -> nn.Module:
    return nn.Conv2d(3, dim, 4, 4)


def _overlapping(dim: int) -> nn.Module:
    return nn.Conv2d(3, dim, 8, 4, padding=2)


def _convolutions(dim: int) -> nn.Module:
    """Convolutions of stride 2, whose patches truly lie almost half a cell up and to the left."""
    return nn.Sequential(
        *(nn.Conv2d(3, dim, 3, 2, 1), nn.BatchNorm2d(dim), nn.ReLU()),
        *(nn.Conv2d(dim, dim, 3, 2, 1), nn.BatchNorm2d(dim), nn.ReLU(), nn.Conv2d(dim, dim, 1)),
    )


class SqueezeAndExcite(nn.Module):
    """A gate per channel, which depends on all pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate(x.mean(dim=(2, 3))))[..., None, None]


def _neighbours(dim: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, dim, 4, 4), nn.Conv2d(dim, dim, 3, padding=1), SqueezeAndExcite(dim))


STEMS = [_overlapping, _convolutions, _neighbours]


class Model(nn.Module):
    """Two layers behind a stem, before the first or the second of which the patches are put into another order."""

    def __init__(
        self, stem: Callable[[int], nn.Module], order: Tensor | None = None, *, layer: int = 0, keys_only: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.cls_token = stem(32), nn.Parameter(torch.randn(1, 1, 32))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.order, self.layer, self.keys_only = order, layer, keys_only

    def rearrange(self, tokens: Tensor) -> Tensor:
        return tokens if self.order is None else torch.cat([tokens[:, :1], tokens[:, 1:][:, self.order]], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.stem(images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        for layer, (norm, qkv) in enumerate(zip(self.norms, self.qkv, strict=True)):
            if layer == self.layer and not self.keys_only:
                x = self.rearrange(x)
            q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in qkv(norm(x)).chunk(3, dim=-1))
            if layer == self.layer and self.keys_only:
                k = self.rearrange(k.transpose(1, 2)).transpose(1, 2)
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x


def _given(rows: int, cols: int) -> TokenGrid:
    return TokenGrid(rows, cols, (4, 4), 1, True)


def _locate(model: nn.Module, rows: int, cols: int) -> TokenGrid:
    return locate_tokens(model, 4 * rows, 4 * cols, grid=_given(rows, cols)).grid


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(("rows", "cols"), [(3, 5), (4, 6), (1, 7)])
def test_patches_in_order_are_accepted(stem: Callable[[int], nn.Module], rows: int, cols: int) -> None:
    assert _locate(Model(stem), rows, cols) == _given(rows, cols)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_another_precision(dtype: torch.dtype) -> None:
    assert _locate(Model(_overlapping).to(dtype), 5, 5) == _given(5, 5)


def test_a_user_who_disables_gradients_for_good() -> None:
    with torch.inference_mode():
        assert _locate(Model(_overlapping), 4, 4) == _given(4, 4)


def _exchange_two(numbers: Tensor) -> Tensor:
    exchanged = numbers.clone()
    exchanged[2, 1], exchanged[2, 2] = numbers[2, 2], numbers[2, 1]
    return exchanged


def _serpentine(numbers: Tensor) -> Tensor:
    numbers = numbers.clone()
    numbers[1::2] = numbers[1::2].flip(1)
    return numbers


def _repeat_one(numbers: Tensor) -> Tensor:
    numbers = numbers.clone()
    numbers[-1, -1] = numbers[-1, -2]
    return numbers


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "column by column": lambda numbers: numbers.T,
    "mirrored": lambda numbers: numbers.flip(1),
    "upside down": lambda numbers: numbers.flip(0),
    "rotated": lambda numbers: numbers.rot90(),
    "rolled by a row": lambda numbers: numbers.roll(1, 0),
    "rolled by a column": lambda numbers: numbers.roll(-1, 1),
    "rolled by a token": lambda numbers: numbers.flatten().roll(1),
    "shuffled": lambda numbers: numbers.flatten()[torch.randperm(numbers.numel(), generator=torch.Generator().manual_seed(0))],
    "columns in pairs": lambda numbers: torch.cat([numbers[:, ::2], numbers[:, 1::2]], dim=1),
    "every second row reversed": _serpentine,
    "two neighbours exchanged": _exchange_two,
    "one patch twice": _repeat_one,
}


@pytest.mark.parametrize(("name", "layer"), [(name, number % 2) for number, name in enumerate(ORDERS)])
@pytest.mark.parametrize("stem", [_plain, *STEMS])
def test_other_orders_are_refused(stem: Callable[[int], nn.Module], name: str, layer: int) -> None:
    rows, cols = 5, 5
    order = ORDERS[name](torch.arange(rows * cols).view(rows, cols)).flatten()
    with pytest.raises(InputError, match=rf"layer {layer} .* does not order its tokens as"):
        _locate(Model(stem, order, layer=layer), rows, cols)


@pytest.mark.parametrize("stem", STEMS)
def test_keys_of_other_patches_are_refused(stem: Callable[[int], nn.Module]) -> None:
    order = torch.arange(25).view(5, 5).T.flatten()
    with pytest.raises(InputError, match=r"layer 1 .* does not order its tokens as"):
        _locate(Model(stem, order, layer=1, keys_only=True), 5, 5)


@pytest.mark.parametrize(
    "stem", [lambda dim: nn.Conv2d(3, dim, (2, 8), (2, 8)), lambda dim: nn.Conv2d(3, dim, (4, 12), (2, 8), (1, 2))]
)
def test_patches_of_another_shape_are_refused(stem: Callable[[int], nn.Module]) -> None:
    """As many patches, told as squares."""
    with pytest.raises(InputError, match="does not order its tokens as"):
        _locate(Model(stem), 4, 4)


@pytest.mark.parametrize("kernel", [8, 14])
def test_patch_sizes_off_by_one_pixel_are_refused(kernel: int) -> None:
    """70 pixels hold ten patches of 7 pixels, but also, with a rest, of 6."""
    model = Model(lambda dim: nn.Conv2d(3, dim, kernel, 7, padding=(kernel - 7) // 2))
    with pytest.raises(InputError):
        locate_tokens(model, 65, 65, grid=TokenGrid(9, 9, (6, 6), 1, True))


@pytest.mark.parametrize(("stem", "images"), [(_plain, 4 + 6 + 3), (_overlapping, 4 + 11)])
def test_number_of_images(stem: Callable[[int], nn.Module], images: int) -> None:
    model = Model(stem)
    shown: list[int] = []
    model.stem.register_forward_pre_hook(lambda module, args: shown.append(len(args[0])))
    with mock.patch("vit_probe.tokens.identity_attention.input_channels", return_value=3):
        _locate(model, 5, 5)
    assert sum(shown) == images


def test_gains_tell_the_cells_of_a_neighbourhood_apart() -> None:
    probe = IdentityAttentionProbe(Model(_plain), 32, 24)
    probe.probe_noise()
    products = CellResponses(probe, TokenGrid(8, 6, (4, 4), 1, True), mixing_gains(8, 6), 0).products.flatten(0, 1)
    overlap = (products.flatten(1) @ products.flatten(1).T) / products.diagonal(dim1=1, dim2=2).sum(1).square().mean()
    cell = torch.arange(48)
    distance = torch.maximum((cell[:, None] // 6 - cell // 6).abs(), (cell[:, None] % 6 - cell % 6).abs())
    assert overlap.diagonal().allclose(torch.ones(48, dtype=torch.float64))
    assert overlap[distance == 1].mean() < 0.02  # 1 / 11 for random gains
    assert overlap[distance > 0].max() < 0.99
