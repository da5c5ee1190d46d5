"""What is added to the patch tokens for their positions, wherever it comes from and in whatever order tokens are kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.attention.test_hooks import leaves_nothing
from tests.example_models import FAMILIES, small_vit, swin
from vit_probe.tokens.added_positions import added_positions


class Model(nn.Module):
    """Patches of 8 x 8 pixels, positions that `add` adds to their tokens, and a layer of attention."""

    def __init__(self, add: Callable[[nn.Module, Tensor], Tensor], table: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.norm, self.add = nn.Conv2d(3, 16, 8, 8), nn.LayerNorm(16), add
        self.table = None if table is None else nn.Parameter(table)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.add(self, self.proj(x)))
        return F.scaled_dot_product_attention(tokens, tokens, tokens)


TABLE = torch.randn(12, 16, generator=torch.Generator().manual_seed(1))
PREFIX = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
WAVE = torch.arange(12.0)[:, None].sin() * PREFIX[0]
ORDER = torch.randperm(12, generator=torch.Generator().manual_seed(3))
WAYS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], Tensor | None, Tensor]] = {
    "a table": (lambda model, x: x.flatten(2).mT + model.table, TABLE, TABLE),
    "channels first": (
        lambda model, x: (x + model.table.mT.unflatten(1, (3, 4))).flatten(2).mT,
        TABLE,
        TABLE,
    ),
    "rows and columns": (
        lambda model, x: (x + model.table[:3].mT[:, :, None] + model.table[3:7].mT[:, None]).flatten(2).mT,
        TABLE,
        (TABLE[:3, None] + TABLE[None, 3:7]).flatten(0, 1),
    ),
    "a shared row": (
        lambda model, x: x.flatten(2).mT + model.table[:1] + model.table[1:],
        torch.cat([PREFIX[:1], TABLE]),
        TABLE + PREFIX[0],
    ),
    "computed on the way": (lambda model, x: x.flatten(2).mT + WAVE, None, WAVE),
    "between prefix and suffix": (
        lambda model, x: (
            torch.cat([PREFIX[:1].expand(len(x), 1, 16), x.flatten(2).mT, PREFIX[1:].expand(len(x), 2, 16)], 1) + model.table
        ),
        torch.cat([PREFIX[:1], TABLE, PREFIX[1:]]),
        TABLE,
    ),
    "in another order": (lambda model, x: x.flatten(2).mT[:, ORDER] + model.table, TABLE, TABLE[ORDER.argsort()]),
    "in blocks": (
        lambda model, x: x.flatten(2).mT[:, ORDER].unflatten(1, (3, 4)) + model.table.unflatten(0, (3, 4)),
        TABLE,
        TABLE[ORDER.argsort()],
    ),
}


@pytest.mark.parametrize("name", WAYS)
def test_what_is_added_to_each_patch(name: str) -> None:
    add, table, expected = WAYS[name]
    model = Model(add, table)
    with leaves_nothing(model):
        found = added_positions(model, 24, 32)
    assert found is not None
    added, rows, cols = found
    assert (rows, cols) == (3, 4)
    torch.testing.assert_close(added, expected.double(), rtol=0, atol=1e-6)


def test_stored_rows_are_returned_without_rounding() -> None:
    for model in (Model(WAYS["a table"][0], TABLE), Model(WAYS["a table"][0], TABLE).bfloat16()):
        found = added_positions(model, 24, 32)
        assert found is not None
        assert torch.equal(found[0], model.table.detach().double())


def test_positions_added_in_two_steps() -> None:
    class TwoSteps(Model):
        def forward(self, x: Tensor) -> Tensor:
            tokens = self.drop(self.proj(x).flatten(2).mT + self.table)
            tokens = self.drop(tokens + self.table.flip(0))
            return F.scaled_dot_product_attention(tokens, tokens, tokens)

    model = TwoSteps(WAYS["a table"][0], TABLE)
    model.drop = nn.Dropout()
    found = added_positions(model, 24, 32)
    assert found is not None
    torch.testing.assert_close(found[0], (TABLE + TABLE.flip(0)).double(), rtol=0, atol=1e-6)


def test_the_same_for_all_patches_is_no_position() -> None:
    model = Model(lambda model, x: x.flatten(2).mT + model.table, PREFIX[:1])
    assert added_positions(model, 24, 32) is None


def test_nothing_is_added() -> None:
    assert added_positions(small_vit(position="none"), 24, 24) is None
    assert added_positions(FAMILIES["timm-dinov3"].model(), 32, 48) is None
    assert added_positions(swin(), 48, 48) is None


def test_images_that_the_model_does_not_take() -> None:
    assert added_positions(Model(WAYS["a table"][0], TABLE), 32, 32) is None
