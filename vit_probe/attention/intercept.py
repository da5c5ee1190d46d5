"""Catching a model's attention: each call of the fused attention, which module made it, and whether it is self-attention."""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["AttentionCall", "AttentionRouter", "ForwardStopped", "evaluated", "intercepted"]

# The second is what a graph of torch.export calls.
_ATTENTION = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
_ASIDE = re.compile("pos|rope|rot|freq|mask|bias")
_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


class ForwardStopped(BaseException):
    """Ends a forward pass whose remainder nobody needs; not an Exception, lest a model catch it."""


@dataclass(frozen=True)
class AttentionCall:
    """One call of `scaled_dot_product_attention` by a self-attention layer.

    Args:
        layer: Number of the layer.
        name: Path of the module that made the call.
        query, key, value: Grouped heads are not yet repeated, and autocast has not cast yet.
        mask: As it was given, broadcast to the call's images; or None.
        dropout_p, is_causal, scale, enable_gqa: As they were given.
        shown_only: The result is thrown away.
    """

    layer: int
    name: str
    query: Float[Tensor, "image head query dim"]
    key: Float[Tensor, "image key_head key dim"]
    value: Float[Tensor, "image key_head key value_dim"]
    mask: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    shown_only: bool

    def fused(self) -> Tensor:
        """What `scaled_dot_product_attention` itself returns."""
        return F.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            self.mask,
            self.dropout_p,
            self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )


@dataclass(frozen=True)
class _Frame:
    """A module whose forward pass is under way."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class AttentionRouter(TorchFunctionMode):
    """Hands each self-attention call to `attend`, whose result goes back to the model.

    Attributes:
        layers: Module path of each self-attention layer.
        skipped: Module paths whose calls were not self-attention, with the reason. Calls from outside the model pass unseen.
        stop_after: If set, the forward pass ends (with `ForwardStopped`) once this layer has been attended to.
        called: Whether the model, or a part of it, was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[str] = []
        self.skipped: dict[str, str] = {}
        self.stop_after: int | None = None
        self.called = False
        self._numbers: dict[tuple[str, int], int] = {}
        self._calls: Counter[str] = Counter()
        self._stack: list[_Frame] = []
        self._kinds: set[type[nn.Module]] = set()
        self._silent: dict[str, nn.Module] = {}
        self._heard: set[str] = set()

    @property
    def missed_modules(self) -> list[str]:
        """Modules in which no call was seen, of a class in which there are calls, or graphs with parameters."""
        silent = {name: module for name, module in self._silent.items() if name not in self._heard}
        return [name for name, module in silent.items() if type(module) in self._kinds or _is_graph(module)]

    def attend(self, call: AttentionCall) -> Tensor:
        """What the model gets as the result of a call of self-attention."""
        raise NotImplementedError

    def pass_by(self, query: Tensor, value: Tensor, fused: Callable[[], Tensor]) -> Tensor:
        """What the model gets as the result of another call: what `scaled_dot_product_attention` returns."""
        return fused()

    def pass_weights(self, seen: tuple[Tensor, Any], unfused: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        """What a model gets that asked for the weights: of both results, that of its own unfused attention."""
        return unfused

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Called before the forward pass of every module."""
        self.called = True
        if name == "":
            self._stack.clear()
            self._calls.clear()
        self._stack.append(_Frame(name, module, args, kwargs))

    def leave(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Called after the forward pass of every module, also where it failed; `output` is None then."""
        if self._stack:
            self._stack.pop()
        if output is not None and name not in self._heard:
            self._silent[name] = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._stack and func in _ATTENTION:
            return self._route(*args, **kwargs)
        if self._stack and func is F.multi_head_attention_forward:
            return self._route_multi_head(_MULTI_HEAD.bind(*args, **kwargs).arguments)
        return func(*args, **kwargs)

    def _route_multi_head(self, given: dict[str, Any]) -> Any:
        """`nn.MultiheadAttention`. While a mode handles one torch function it does not see those called inside it."""
        query, key = given["query"], given["key"]
        crossed = query is not key and not (query.shape == key.shape and torch.equal(query, key))

        def route(shown_only: bool, **changed: Any) -> Any:
            def inner(*args: Any, **kwargs: Any) -> Tensor:
                return self._route(*args, crossed=crossed, shown_only=shown_only, **kwargs)

            names = {"scaled_dot_product_attention": inner, "has_torch_function": lambda tensors: False}
            return _with_globals(F.multi_head_attention_forward, **names)(**(given | changed))

        if not given.get("need_weights", True):
            return route(shown_only=False)
        # The model wants the weights themselves, which only the unfused path gives; the fused one is run to be seen.
        with torch.no_grad():
            seen = route(shown_only=True, need_weights=False, training=False)
        return self.pass_weights(seen, F.multi_head_attention_forward(**given))

    def _route(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        crossed: bool | None = None,
        shown_only: bool = False,
    ) -> Tensor:
        """Stands in for `scaled_dot_product_attention`."""
        self._heard.update(outer.name for outer in self._stack)
        frame = self._stack[-1]
        q, k, v, mask = query, key, value, attn_mask
        heads = getattr(frame.module, "num_heads", None)
        folded = query.ndim == 3 and isinstance(heads, int) and query.shape[0] % heads == 0
        if folded:  # images and heads in one dimension
            q, k, v = (tensor.unflatten(0, (-1, heads)) for tensor in (q, k, v))
            if mask is not None and mask.ndim == 3 and mask.shape[0] == query.shape[0]:
                mask = mask.unflatten(0, (-1, heads))
        reason = _not_self_attention(q, k, _two_sequences(frame) if crossed is None else crossed)
        if reason:
            self.skipped.setdefault(frame.name, reason)
            options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
            fused = partial(F.scaled_dot_product_attention, query, key, value, attn_mask, dropout_p, is_causal, **options)
            return self.pass_by(query, value, fused)
        self._kinds.add(type(frame.module))
        layer = self._number(frame.name)
        call = AttentionCall(layer, frame.name, q, k, v, mask, dropout_p, is_causal, scale, enable_gqa, shown_only)
        output = self.attend(call)
        if layer == self.stop_after:
            self._stack.clear()
            raise ForwardStopped
        return output.flatten(0, 1) if folded else output

    def _number(self, name: str) -> int:
        """The layer's number: by module path, and by the count of its calls within one call of the whole model."""
        call = self._calls[name] if self._stack[0].name == "" else 0
        self._calls[name] += 1
        if (name, call) not in self._numbers:
            self._numbers[name, call] = len(self.layers)
            self.layers.append(name)
        return self._numbers[name, call]


@contextmanager
def intercepted(model: nn.Module, router: AttentionRouter) -> Iterator[None]:
    """Has `router` handle the attention of `model`; at the end of the context, also after an exception, every trace is gone.

    Compiled parts of the model run uncompiled meanwhile, since nothing can be seen within a compiled graph.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    # Where nothing was compiled, the compiler need not even be imported.
    uncompiled = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    handles = []
    try:
        for name, module in model.named_modules():
            before, after = _bound(router.enter, name), _bound(router.leave, name)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
        # The fast path of nn.MultiheadAttention is one kernel that never calls scaled_dot_product_attention.
        torch.backends.mha.set_fastpath_enabled(False)
        with uncompiled, router:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for handle in handles:
            handle.remove()


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Has the model in evaluation mode and without gradients within the context; then every module is as it was."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _bound(method: Callable[..., None], name: str) -> Callable[..., None]:
    return lambda *given: method(name, *given)


def _not_self_attention(query: Tensor, key: Tensor, crossed: bool) -> str | None:
    """Why a call is not one of a self-attention layer; None if it is."""
    if query.ndim == 3:
        return f"queries of shape {tuple(query.shape)} do not tell their heads from their images"
    if query.ndim != 4:
        return f"queries of shape {tuple(query.shape)} are in windows in a dimension of their own, which is not supported"
    queries, keys = query.shape[-2], key.shape[-2]
    if queries != keys:
        return f"{queries} {'query' if queries == 1 else 'queries'} for {keys} {'key' if keys == 1 else 'keys'}"
    return "the queries are of one sequence, the keys of another" if crossed else None


def _two_sequences(frame: _Frame) -> bool:
    """Whether a module was given two sequences of tokens of one shape, as cross-attention is; positions and masks are none."""
    if sum(map(_is_sequence, (*frame.args, *frame.kwargs.values()))) < 2:
        return False
    given = inspect.signature(frame.module.forward).bind(*frame.args, **frame.kwargs).arguments
    first, *others = [value for name, value in given.items() if _is_sequence(value) and not _ASIDE.search(name)] or [None]
    return any(other is not first and other.shape == first.shape for other in others)


def _is_graph(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) and any(True for _ in module.parameters())


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()


def _with_globals(function: Any, **names: Any) -> FunctionType:
    """A copy of a Python function that finds other objects under some global names; the original is left alone."""
    copy = FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
