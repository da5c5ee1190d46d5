"""Intercepting attention: each call of the fused attention, the module that made it, and whether it is self-attention."""

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

__all__ = ["AttentionCall", "AttentionInterceptor", "ForwardStopped", "evaluation_mode", "intercept_attention"]

# Graphs made by torch.export call the operator instead of the Python function.
_FUSED_ATTENTION = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
_MULTI_HEAD_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_NOT_TOKENS = re.compile("pos|rope|rot|freq|mask|bias")  # names of arguments that have the shape of tokens but are none


class ForwardStopped(BaseException):
    """Ends a forward pass whose remainder is not needed.

    It is a BaseException so that an `except Exception` inside the model does not catch it.
    """


@dataclass(frozen=True)
class AttentionCall:
    """One call of `scaled_dot_product_attention` by a self-attention layer.

    Args:
        layer: Number of the layer.
        name: Path of the module that made the call.
        query, key, value: Before grouped heads are repeated and before autocast casts.
        mask: As passed to the call, broadcastable to its images; or None.
        dropout_p, is_causal, scale, enable_gqa: As passed to the call.
        discard_output: Whether the result of the call is not used.
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
    discard_output: bool

    def fused(self) -> Tensor:
        """Return the result of `scaled_dot_product_attention` itself."""
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
    """A module whose forward pass is running."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


# A function mode, since it gets the call with its real arguments whichever way a library imported the function, and above
# autograd and autocast. Patching torch.nn.functional would miss names that were imported before; a dispatch mode would see
# the kernels of one backend; hooks on modules alone would not see the queries and keys, which are made inside `forward`.
class AttentionInterceptor(TorchFunctionMode):
    """Passes each self-attention call to `handle_self_attention`, whose result goes back to the model.

    Attributes:
        layers: Module path of each self-attention layer.
        skipped: Module paths whose calls were not self-attention, with the reason. Calls from outside the model are ignored.
        stop_after: If set, the forward pass ends (with `ForwardStopped`) after this layer's call was handled.
        called: Whether the model, or a part of it, was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[str] = []
        self.skipped: dict[str, str] = {}
        self.stop_after: int | None = None
        self.called = False
        self._layer_numbers: dict[tuple[str, int], int] = {}
        self._call_counts: Counter[str] = Counter()
        # A function mode does not learn which module makes a call: hooks keep the modules that are running, innermost last.
        self._stack: list[_Frame] = []
        self._attention_types: set[type[nn.Module]] = set()
        self._modules_without_calls: dict[str, nn.Module] = {}
        self._modules_with_calls: set[str] = set()

    @property
    def missed_modules(self) -> list[str]:
        """Modules whose attention was probably missed.

        They ran without a call, although others of their class made calls or they are TorchScript graphs with parameters.
        """
        silent = {name: m for name, m in self._modules_without_calls.items() if name not in self._modules_with_calls}
        return [name for name, m in silent.items() if type(m) in self._attention_types or _is_parametrized_graph(m)]

    def handle_self_attention(self, call: AttentionCall) -> Tensor:
        """Return what the model gets as the result of a self-attention call."""
        raise NotImplementedError

    def handle_other_attention(self, query: Tensor, value: Tensor, fused: Callable[[], Tensor]) -> Tensor:
        """Return what the model gets as the result of any other call: by default, that of the fused attention."""
        return fused()

    def handle_weights(self, intercepted: tuple[Tensor, Any], unfused: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        """Return what `nn.MultiheadAttention` returns if it was asked for weights: by default, its own unfused result."""
        return unfused

    def before_forward(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note that the forward pass of a module begins."""
        self.called = True
        if name == "":
            # `always_call` hooks run after an Exception only, so a pass that another BaseException ended (KeyboardInterrupt, or
            # a ForwardStopped raised elsewhere) leaves its frames behind, which hold the images and would claim later calls.
            self._stack.clear()
            self._call_counts.clear()
        self._stack.append(_Frame(name, module, args, kwargs))

    def after_forward(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Note that the forward pass of a module has ended; `output` is None if it raised an exception."""
        if self._stack:
            self._stack.pop()
        if output is not None and name not in self._modules_with_calls:
            self._modules_without_calls[name] = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._stack and func in _FUSED_ATTENTION:
            return self._dispatch(*args, **kwargs)
        if self._stack and func is F.multi_head_attention_forward:
            return self._dispatch_multi_head(_MULTI_HEAD_SIGNATURE.bind(*args, **kwargs).arguments)
        return func(*args, **kwargs)

    def _dispatch_multi_head(self, arguments: dict[str, Any]) -> Any:
        """Stand in for `multi_head_attention_forward`, the function behind `nn.MultiheadAttention`."""
        query, key = arguments["query"], arguments["key"]
        is_cross = query is not key and not (query.shape == key.shape and torch.equal(query, key))

        def run(discard_output: bool, **changes: Any) -> Any:
            def attention(*args: Any, **kwargs: Any) -> Tensor:
                return self._dispatch(*args, is_cross=is_cross, discard_output=discard_output, **kwargs)

            # A mode is off while it handles a function, so it would not see the fused attention called inside this one. A copy
            # of the function calls `attention` instead. It must not look for modes itself: those of enclosing contexts would
            # take over, with the original function.
            replaced = {"scaled_dot_product_attention": attention, "has_torch_function": lambda tensors: False}
            return _with_globals(F.multi_head_attention_forward, **replaced)(**(arguments | changes))

        if not arguments.get("need_weights", True):
            return run(discard_output=False)
        # Only the unfused path returns weights, and it calls no fused attention. So both paths run, the fused one for what it
        # shows, without dropout, so that it draws no random numbers.
        with torch.no_grad():
            intercepted = run(discard_output=True, need_weights=False, training=False)
        return self.handle_weights(intercepted, F.multi_head_attention_forward(**arguments))

    def _dispatch(
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
        is_cross: bool | None = None,
        discard_output: bool = False,
    ) -> Tensor:
        """Stand in for `scaled_dot_product_attention`."""
        self._modules_with_calls.update(frame.name for frame in self._stack)
        frame = self._stack[-1]
        q, k, v, mask = query, key, value, attn_mask
        heads = getattr(frame.module, "num_heads", None)
        folded = query.ndim == 3 and isinstance(heads, int) and query.shape[0] % heads == 0
        if folded:  # images and heads share the first dimension
            q, k, v = (tensor.unflatten(0, (-1, heads)) for tensor in (q, k, v))
            if mask is not None and mask.ndim == 3 and mask.shape[0] == query.shape[0]:
                mask = mask.unflatten(0, (-1, heads))
        reason = _not_self_attention(q, k, _has_two_sequences(frame) if is_cross is None else is_cross)
        if reason:
            self.skipped.setdefault(frame.name, reason)
            options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
            fused = partial(F.scaled_dot_product_attention, query, key, value, attn_mask, dropout_p, is_causal, **options)
            return self.handle_other_attention(query, value, fused)
        self._attention_types.add(type(frame.module))
        layer = self._number_layer(frame.name)
        call = AttentionCall(layer, frame.name, q, k, v, mask, dropout_p, is_causal, scale, enable_gqa, discard_output)
        output = self.handle_self_attention(call)
        if layer == self.stop_after:
            self._stack.clear()  # no hook pops the frames after a BaseException
            raise ForwardStopped
        return output.flatten(0, 1) if folded else output

    def _number_layer(self, name: str) -> int:
        """Return the number of the layer: one per module and per call of that module within a call of the whole model."""
        # Where parts of the model are called, nothing marks the start of a pass: each call of a module counts as its first.
        call = self._call_counts[name] if self._stack[0].name == "" else 0
        self._call_counts[name] += 1
        if (name, call) not in self._layer_numbers:
            self._layer_numbers[name, call] = len(self.layers)
            self.layers.append(name)
        return self._layer_numbers[name, call]


@contextmanager
def intercept_attention(model: nn.Module, interceptor: AttentionInterceptor) -> Iterator[None]:
    """Let `interceptor` handle the attention of `model` inside the context.

    All hooks and settings are undone at the end, also after an exception. Compiled parts of the model run uncompiled inside
    the context, since calls within a compiled graph cannot be intercepted.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    # set_stance imports the compiler, which takes seconds; if it was not imported before, nothing is compiled.
    uncompiled = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    handles = []
    try:
        for name, module in model.named_modules():
            before, after = partial(interceptor.before_forward, name), partial(interceptor.after_forward, name)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
        # The fast path of nn.MultiheadAttention is a single kernel that never calls scaled_dot_product_attention.
        torch.backends.mha.set_fastpath_enabled(False)
        with uncompiled, interceptor:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for handle in handles:
            handle.remove()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, without gradients, inside the context; then restore the mode of every module."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _not_self_attention(query: Tensor, key: Tensor, is_cross: bool) -> str | None:
    """Return why a call is not that of a self-attention layer; None if it is."""
    if query.ndim == 3:
        return f"queries of shape {tuple(query.shape)}, whose heads cannot be separated from the images"
    if query.ndim != 4:
        return f"queries of shape {tuple(query.shape)}: a separate dimension for windows is not supported"
    queries, keys = query.shape[-2], key.shape[-2]
    if queries != keys:
        return f"{queries} {'query' if queries == 1 else 'queries'} for {keys} {'key' if keys == 1 else 'keys'}"
    return "the queries come from one sequence, the keys from another" if is_cross else None


def _has_two_sequences(frame: _Frame) -> bool:
    """Return whether a module got two token sequences of one shape, as cross-attention does."""
    if sum(map(_is_sequence, (*frame.args, *frame.kwargs.values()))) < 2:
        return False
    arguments = inspect.signature(frame.module.forward).bind(*frame.args, **frame.kwargs).arguments
    sequences = [value for name, value in arguments.items() if _is_sequence(value) and not _NOT_TOKENS.search(name)]
    return any(other is not sequences[0] and other.shape == sequences[0].shape for other in sequences[1:])


def _is_parametrized_graph(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) and any(True for _ in module.parameters())


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()


def _with_globals(function: Any, **replaced: Any) -> FunctionType:
    """Return a copy of a Python function in which some global names are replaced; the original is not changed."""
    copy = FunctionType(
        function.__code__, {**function.__globals__, **replaced}, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
