"""Intercepting attention: each call of the fused attention, the module that made it, and whether it is self-attention."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vit_probe.attention.calls import AttentionCall, UnfusedCall
from vit_probe.attention.exclusive import exclusive_use, interceptable_kernels
from vit_probe.attention.projections import unmeasured_attention
from vit_probe.attention.softmax import SoftmaxProduct, SoftmaxTracker

__all__ = ["AttentionInterceptor", "ForwardStopped", "evaluation_mode", "intercept_attention"]

# Graphs made by torch.export call the operator instead of the Python function.
_FUSED_ATTENTION = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
_MULTI_HEAD_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_NUM_HEADS = ("num_heads", "num_attention_heads", "heads", "n_heads", "nhead", "n_head")
_NOT_TOKENS = re.compile("pos|rope|rot|freq|mask|bias")  # names of arguments that have the shape of tokens but are none


class ForwardStopped(BaseException):
    """Ends a forward pass whose remainder is not needed.

    It is a BaseException so that an `except Exception` inside the model does not catch it.
    """


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
        unfused: Module paths of those layers that compute their attention in code of their own, by a softmax.
        skipped: Module paths of other attention, with the reason: calls that were not self-attention and, after the context of
            `intercept_attention`, modules with projections of queries, keys and values that made no call. Calls from outside
            the model are ignored.
        stop_after: If set, the forward pass ends (with `ForwardStopped`) after this layer's call was handled.
        called: Whether the model, or a part of it, was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[str] = []
        self.unfused: list[str] = []
        self.skipped: dict[str, str] = {}
        self.stop_after: int | None = None
        self.called = False
        self._layer_numbers: dict[tuple[str, int], int] = {}
        self._call_counts: Counter[str] = Counter()
        # A function mode does not learn which module makes a call: hooks keep the modules that are running, innermost last.
        self._stack: list[_Frame] = []
        self._softmaxes = SoftmaxTracker()
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

    def handle_other_attention(self, compute: Callable[[], Tensor]) -> Tensor:
        """Return what the model gets as the result of any other attention: by default, what the untouched call computes."""
        return compute()

    def note_unmeasured(self, model: nn.Module) -> None:
        """Add to `skipped` the modules of `model` that hold projections of queries, keys and values but made no call."""
        seen = {*self.layers, *self.skipped}
        self.skipped |= unmeasured_attention(model, seen, self._modules_with_calls | self._modules_without_calls.keys())

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
        # Not simply the last frame: where a user's pre-hook raises, this hook is called though `before_forward` was not.
        depth = next((depth for depth in reversed(range(len(self._stack))) if self._stack[depth].module is module), None)
        if depth is not None:
            del self._stack[depth:]
        if output is not None and name not in self._modules_with_calls:
            self._modules_without_calls[name] = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._stack:
            return func(*args, **kwargs)
        if func in _FUSED_ATTENTION:
            return self._dispatch(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._dispatch_multi_head(_MULTI_HEAD_SIGNATURE.bind(*args, **kwargs).arguments)
        product = None if kwargs else self._softmaxes.product(func, args)
        if product is not None:
            return self._dispatch_product(product)
        result = func(*args, **kwargs)
        self._softmaxes.follow(func, args, kwargs, result, self._stack)
        return result

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
        frame = self._stack[-1]
        q, k, v, mask = query, key, value, attn_mask
        heads = _num_heads(frame, query.shape)
        if heads:  # images and heads share the first dimension
            q, k, v = (tensor.unflatten(0, (-1, heads)) for tensor in (q, k, v))
            if mask is not None and mask.ndim == 3 and mask.shape[0] == query.shape[0]:
                mask = mask.unflatten(0, (-1, heads))
        is_cross = _has_two_sequences(frame) if is_cross is None else is_cross
        reason = _not_self_attention(frame, (*q.shape[:-1], k.shape[-2]), v, is_cross)
        if reason:
            options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
            fused = partial(F.scaled_dot_product_attention, query, key, value, attn_mask, dropout_p, is_causal, **options)
            return self._skip(frame, reason, fused)
        layer = self._number_layer(frame)
        output = self._show(
            frame, AttentionCall(layer, frame.name, q, k, v, mask, dropout_p, is_causal, scale, enable_gqa, discard_output)
        )
        return output.flatten(0, 1) if heads else output

    def _dispatch_product(self, product: SoftmaxProduct) -> Tensor:
        """Stand in for the product of a softmax and values."""
        # The softmax, the product or both may be modules of their own (nn.Softmax): the attention is what holds the two.
        around = [frame for frame, other in zip(self._stack, product.modules, strict=False) if frame is other]
        if not around:  # the weights come from elsewhere
            return product.compute(product.weights)
        frame, scores = around[-1], product.scores
        if product.weights.ndim == 4 and scores.numel() == product.weights.numel():
            scores = scores.reshape(product.weights.shape)
        elif heads := _num_heads(frame, scores.shape):
            scores = scores.unflatten(0, (-1, heads))
        reason = _not_self_attention(frame, scores.shape, product.values, _has_two_sequences(frame))
        if reason:
            return self._skip(frame, reason, partial(product.compute, product.weights))
        if frame.name not in self.unfused:
            self.unfused.append(frame.name)
        no_vectors = scores.new_empty(*scores.shape[:3], 0)
        call = UnfusedCall(
            self._number_layer(frame),
            frame.name,
            *(no_vectors, no_vectors, no_vectors),
            mask=scores,
            scale=1.0,
            product=product.compute,
            weights=product.weights,
            values=product.values,
            to_tokens=product.to_tokens,
        )
        return self._show(frame, call)

    def _show(self, frame: _Frame, call: AttentionCall) -> Tensor:
        """Return what the model gets as the result of a self-attention call."""
        self._modules_with_calls.update(frame.name for frame in self._stack)
        self._attention_types.add(type(frame.module))
        output = self.handle_self_attention(call)
        if call.layer == self.stop_after:
            self._stack.clear()  # no hook pops the frames after a BaseException
            raise ForwardStopped
        return output

    def _skip(self, frame: _Frame, reason: str, compute: Callable[[], Tensor]) -> Tensor:
        """Return what the model gets as the result of other attention."""
        self._modules_with_calls.update(frame.name for frame in self._stack)
        self.skipped.setdefault(frame.name, reason)
        return self.handle_other_attention(compute)

    def _number_layer(self, frame: _Frame) -> int:
        """Return the number of the layer: one per module and per call of that module within a call of the whole model."""
        # Where parts of the model are called, nothing marks the start of a pass: each call of a module counts as its first.
        name = frame.name
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

    Raises:
        InputError: If another thread is measuring the model.
    """
    handles = []
    with exclusive_use(model):
        try:
            for name, module in model.named_modules():
                before, after = partial(interceptor.before_forward, name), partial(interceptor.after_forward, name)
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
            with interceptable_kernels(), interceptor:
                yield
            if interceptor.called and interceptor.stop_after is None:
                interceptor.note_unmeasured(model)
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, without gradients, inside the context; then restore the mode of every module.

    Raises:
        InputError: If another thread is measuring the model.
    """
    with exclusive_use(model):
        training = {module: module.training for module in model.modules()}
        try:
            with suppress(NotImplementedError):  # graphs of torch.export, whose mode is fixed
                model.eval()
            with torch.no_grad():
                yield
        finally:
            for module, mode in training.items():
                module.training = mode


def _not_self_attention(frame: _Frame, shape: Sequence[int], value: Tensor, is_cross: bool) -> str | None:
    """Return why attention weights of this shape are not those of a self-attention layer over tokens; None if they are."""
    if len(shape) == 3:
        return f"attention of shape {tuple(shape)}, whose heads cannot be separated from the images"
    if len(shape) != 4:
        return f"attention of shape {tuple(shape)}: a separate dimension for windows is not supported"
    images, heads, queries, keys = shape
    if queries != keys:
        return f"{queries} {'query' if queries == 1 else 'queries'} for {keys} {'key' if keys == 1 else 'keys'}"
    if _is_over_channels(frame, images, heads, queries, value):
        return "attention between channels, not between tokens"
    return "the queries come from one sequence, the keys from another" if is_cross else None


def _is_over_channels(frame: _Frame, images: int, heads: int, queries: int, value: Tensor) -> bool:
    """Return whether the channels of a module's input attend to each other, as in XCiT and DaViT, and its tokens do not.

    The queries of all heads are then as many as the channels, and each value has one entry per token.
    """
    x = frame.args[0] if frame.args and isinstance(frame.args[0], Tensor) else value
    if x.ndim < 3 or len(x) != images or x.shape[1:3] == (heads, queries):  # the last: heads are separated already
        return False
    channels, length = heads * queries, value.numel() // (images * heads * queries)
    is_width = channels == x.shape[-1] or (x.ndim == 4 and channels == x.shape[1])
    return is_width and x.numel() == images * channels * length and length != queries


def _num_heads(frame: _Frame, shape: Sequence[int]) -> int | None:
    """Return the number of heads if images and heads share the first of three dimensions; None if not or if it is unknown."""
    if len(shape) != 3:
        return None
    named = (getattr(frame.module, name, None) for name in _NUM_HEADS)
    heads = next((heads for heads in named if isinstance(heads, int) and heads > 0), None)
    if heads is None and frame.args and isinstance(frame.args[0], Tensor) and frame.args[0].shape[0] == shape[0]:
        return 1  # as many maps as images
    return heads if heads is not None and shape[0] % heads == 0 else None


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
