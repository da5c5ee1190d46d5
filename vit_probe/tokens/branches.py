"""Blocks that are lists of modules, such as [attention, MLP], whose outputs the model itself adds to the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["BranchSum", "is_list"]


def is_list(module: nn.Module) -> bool:
    """Return whether a module has no forward pass of its own, as lists of modules.

    Examples:
        >>> is_list(nn.ModuleList()), is_list(nn.Sequential())
        (True, False)
    """
    return type(module).forward is nn.Module.forward


class BranchSum:
    """The tokens that the modules of a list make, one after the other.

    A module's output either goes into the next module of the list, as that of a norm does, or is added to the tokens.

    Args:
        layer: The attention layer in the list.
        given: What the first module of the list got.

    Examples:
        >>> tokens, mlp = torch.ones(1, 2, 3), nn.Identity()
        >>> branches = BranchSum(0, tokens)
        >>> branches.leave(mlp(tokens))
        >>> branches.makes(2 * tokens), branches.makes(3 * tokens)
        (True, False)
    """

    def __init__(self, layer: int, given: Tensor | None) -> None:
        self.layer = layer
        self._sum = given
        self._output: Tensor | None = None  # of the module before, not yet added

    def enter(self, given: Tensor | None) -> None:
        """Note what the next module of the list gets."""
        if not _is_same(given, self._output):
            self._sum = _added(self._sum, self._output)
        self._output = None

    def leave(self, output: Tensor | None) -> None:
        """Note what the module returns."""
        self._output = output

    def makes(self, tokens: Tensor | None) -> bool:
        """Return whether `tokens` are the sum of the tokens and the outputs, or the last output."""
        return _is_close(tokens, _added(self._sum, self._output)) or _is_same(tokens, self._output)


def _added(tokens: Tensor | None, output: Tensor | None) -> Tensor | None:
    if tokens is None or output is None:
        return tokens
    return tokens + output if tokens.shape == output.shape else None


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and (one is other or (one.shape == other.shape and torch.equal(one, other)))


def _is_close(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.shape != other.shape:
        return False
    tolerance = torch.finfo(one.dtype).eps ** 0.5 * float(other.abs().max())
    return torch.allclose(one, other, rtol=0, atol=tolerance)
