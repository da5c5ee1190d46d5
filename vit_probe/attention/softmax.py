"""Recognising attention that a model computes in its own code: the product of a softmax and the values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vit_probe.errors import InputError

__all__ = ["SoftmaxProduct", "SoftmaxTracker"]

# Functions by the name that they have in torch, torch.Tensor, torch.nn.functional and torch.ops.aten alike.
_SOFTMAX = {"softmax", "special_softmax", "_softmax"}
_PRODUCTS = {"matmul", "bmm", "einsum"}
# What may stand between the two. Anything else (a second softmax subtracted, heads mixed, rows masked or rescaled) changes the
# weights, so that it is no longer the softmax that multiplies the values.
_UNCHANGED = {
    *("dropout", "to", "_to_copy", "type", "type_as", "float", "half", "bfloat16", "double"),
    *("contiguous", "clone", "view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
}


@dataclass(frozen=True)
class SoftmaxProduct:
    """A product of attention weights and values that is about to be computed.

    Args:
        scores: What the softmax was taken of, over the last axis.
        modules: The modules that were running when the softmax was computed, innermost last.
        weights: The result of the softmax, after dropout.
        values: The other factor.
        compute: From weights to the product.
        to_tokens: Puts the axes of the product into the order of the weights' axes, without the last, and then the others.
    """

    scores: Tensor
    modules: tuple[Any, ...]
    weights: Tensor
    values: Tensor
    compute: Callable[[Tensor], Tensor]
    to_tokens: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Softmax:
    scores: Tensor
    modules: tuple[Any, ...]
    version: int | None  # of the tensor that holds the result: another one if it was written to
    is_dropped: bool = False  # whether dropout has set some weights to 0


class SoftmaxTracker:
    """Follows the results of softmax from one torch function to the next, until one multiplies values.

    Examples:
        >>> import torch
        >>> scores, values = torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 4)
        >>> tracker, weights = SoftmaxTracker(), torch.softmax(scores, -1)
        >>> tracker.follow(torch.softmax, (scores, -1), {}, weights, ["blocks.0.attn"])
        >>> product = tracker.product(torch.matmul, (weights, values))
        >>> product.modules, product.values is values
        (('blocks.0.attn',), True)
        >>> tracker.product(torch.matmul, (weights - 0.1, values))  # None: it is not the softmax any more
    """

    def __init__(self) -> None:
        self._results = WeakIdKeyDictionary()  # keeps no map alive
        self._multiplied = WeakIdKeyDictionary()  # scores whose softmax has been multiplied

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, modules: Sequence[Any]) -> None:
        """Take note of a function that was called while `modules` were running."""
        name = _name(func)
        if name in _SOFTMAX:
            scores = args[0] if args else None
            axis = kwargs["dim"] if "dim" in kwargs else args[1] if len(args) > 1 else None
            if isinstance(scores, Tensor) and scores.ndim >= 3 and axis in (-1, scores.ndim - 1) and "out" not in kwargs:
                self._results[result] = _Softmax(scores, tuple(modules), _version(result))
        elif self._results and name in _UNCHANGED and isinstance(result, Tensor):
            softmax = self._softmax(args[0] if args else None)
            if softmax is not None and result.shape[-2:] == softmax.scores.shape[-2:]:
                dropped = softmax.is_dropped or (name == "dropout" and _drops(args, kwargs))
                self._results[result] = _Softmax(softmax.scores, softmax.modules, _version(result), dropped)

    def product(self, func: Any, args: Sequence[Any]) -> SoftmaxProduct | None:
        """Return the product of a softmax and values, if that is what the function computes of these arguments.

        Raises:
            InputError: If the softmax has been multiplied before.
        """
        if not self._results or (name := _name(func)) not in _PRODUCTS:
            return None
        first = 1 if name == "einsum" else 0
        if len(args) != first + 2 or not all(isinstance(arg, Tensor) for arg in args[first:]):
            return None
        place = first if self._softmax(args[first]) is not None else first + 1
        weights, values = args[place], args[2 * first + 1 - place]
        softmax = self._softmax(weights)
        if softmax is None or not (softmax.is_dropped or _holds_softmax(weights, softmax.scores)):
            return None
        if name == "einsum":
            order = _axes_of_tokens(args[0], place - 1)
        else:
            is_product = place == 0 and values.ndim == weights.ndim and len(values) == len(weights)
            order = list(range(weights.ndim)) if is_product else None
        if order is None:
            return None

        if softmax.scores in self._multiplied:
            raise InputError(
                "a layer multiplies the same softmax twice: its attention is not one softmax times the values, so there is no "
                "attention map that could be measured"
            )
        self._multiplied[softmax.scores] = None

        def compute(replaced: Tensor) -> Tensor:
            result: Tensor = func(*args[:place], replaced, *args[place + 1 :])
            return result

        return SoftmaxProduct(softmax.scores, softmax.modules, weights, values, compute, lambda output: output.permute(order))

    def _softmax(self, tensor: Any) -> _Softmax | None:
        """Return where a tensor comes from if it holds the result of a softmax still."""
        softmax: _Softmax | None = self._results.get(tensor) if isinstance(tensor, Tensor) else None
        return softmax if softmax is not None and softmax.version == _version(tensor) else None


def _drops(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call of `dropout` sets anything to 0; arguments as in `torch.nn.functional` and `torch`."""
    share = kwargs["p"] if "p" in kwargs else args[1] if len(args) > 1 else 0.5
    flags = [kwargs[name] for name in ("training", "train") if name in kwargs] or list(args[2:3])
    return share > 0 and all(flags)


def _holds_softmax(weights: Tensor, scores: Tensor) -> bool:
    """Return whether weights are the softmax of the scores in the first and the last head.

    Tensors do not tell of everything that is written to them: not in inference mode, and not through `.data`.
    """
    heads = [-1, *scores.shape[-2:]]
    some = torch.stack([scores.reshape(heads)[[0, -1]].float().softmax(dim=-1), weights.reshape(heads)[[0, -1]].float()])
    expected, found = some.nan_to_num()
    return bool(((expected - found).abs() <= 1e-5 + 4 * torch.finfo(weights.dtype).eps).all())


def _axes_of_tokens(equation: Any, place: int) -> list[int] | None:
    """Return the axes of an einsum's output in the order of the weights' axes; None unless it sums values over the keys.

    Args:
        equation: Such as `b h i j, b h j d -> b h i d`.
        place: Which of its two inputs the weights are.
    """
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    inputs, output = equation.replace(" ", "").split("->")
    terms = inputs.split(",")
    weights, values = terms[place], terms[1 - place]
    images_and_heads, query, key = weights[:-2], weights[-2], weights[-1]
    is_product = key in values and key not in output and query in output and query not in values
    if not is_product or weights[0] not in values or not set(images_and_heads) <= set(output):
        return None
    return [output.index(axis) for axis in [*images_and_heads, query, *(axis for axis in output if axis not in weights)]]


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", "")).partition(".")[0]  # without the overload, as in `softmax.int`


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
