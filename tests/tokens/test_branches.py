"""What the modules of a list make of the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vit_probe.tokens.branches import BranchSum, is_list


def after(*steps: tuple[Tensor, Tensor]) -> BranchSum:
    """Modules that get the first tensor of each step and return the second."""
    branches = BranchSum(0, steps[0][0])
    branches.leave(steps[0][1])
    for given, output in steps[1:]:
        branches.enter(given)
        branches.leave(output)
    return branches


def test_outputs_are_added_or_go_into_the_next_module() -> None:
    x, normed, attention, mlp = torch.randn(4, 2, 3, 8)
    y = x + attention
    for branches in (
        after((x, attention), (y, mlp)),
        after((x, normed), (normed, attention), (y, mlp)),
        after((x, attention), (y, normed), (normed, mlp)),
    ):
        assert branches.makes(y + mlp)
        assert branches.makes((y + mlp) * (1 + 1e-7))
        assert not branches.makes(y)
        assert not branches.makes(x + mlp)
        assert not branches.makes(None)


def test_the_last_of_modules_in_a_row() -> None:
    x, y, z = torch.randn(3, 2, 3, 8)
    assert after((x, y), (y, z)).makes(z)
    assert not after((x, y), (y, z)).makes(y)


def test_another_shape() -> None:
    assert not after((torch.randn(2, 3, 8), torch.randn(2, 8))).makes(torch.randn(2, 3, 8))


def test_lists_have_no_forward_pass() -> None:
    assert is_list(nn.ModuleList())
    assert is_list(nn.ModuleDict())
    assert not is_list(nn.Linear(1, 1))
