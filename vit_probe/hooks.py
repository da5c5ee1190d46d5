"""The one mechanism that sees attention: `attention_hooks`.

It stands where every Vision Transformer of today computes its attention, in
`torch.nn.functional.scaled_dot_product_attention`, and so receives the true queries, keys and values of each layer, whichever
library wrote the model. Attention is computed there tile by tile; each tile is shown to the observers and then multiplied with
the values, so that one softmax serves the measures and the model's own output, and no N x N map outlives its tile.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from vit_probe.errors import InputError

__all__ = ["AttentionHooks", "AttentionObserver", "AttentionTile", "attention_hooks"]


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """The attention of some queries of some images in one layer.

    Args:
        layer: Number of the self-attention layer, from 0, in the order of the first calls.
        name: Path of the module that made the call, such as `blocks.0.attn`.
        images: Which images of the batch.
        queries: Which query tokens.
        num_tokens: Tokens of the sequence.
        probabilities: Softmax weights over all tokens, in float32 or float64. The memory is used again for the next tile:
            reduce it or copy it, and do not write to it.
    """

    layer: int
    name: str
    images: slice
    queries: slice
    num_tokens: int
    probabilities: Float[Tensor, "image head query key"]


class AttentionObserver(Protocol):
    """What `attention_hooks` shows attention to. Tiles come layer by layer, then by images, then by queries, each in order."""

    def update(self, tile: AttentionTile) -> None: ...


class ForwardStopped(BaseException):
    """Ends a forward pass whose remainder nobody needs; not an Exception, lest a model catch it."""


@contextmanager
def attention_hooks(model: nn.Module, *observers: AttentionObserver, tile_bytes: int = 4 << 20) -> Iterator[AttentionHooks]:
    """Shows the attention of every self-attention layer to `observers` while `model` is called within the context.

    The model stays as it is, fused attention included, and returns what it would have returned, within rounding. Where
    gradients flow or attention dropout is active, its output is that of the fused attention itself, and observers see the
    probabilities before dropout. Calls whose queries and keys differ in number (pooling heads, cross- and class-attention) pass
    through and are listed in `skipped`. At the end, also after an exception, every trace is gone.

    Args:
        model: Any module whose attention goes through `scaled_dot_product_attention`.
        observers: Shown each tile in turn.
        tile_bytes: Upper bound of a tile's size; one query of one image is the least.

    Raises:
        InputError: At the end of the context, if the model was called and no self-attention was seen.
    """
    if tile_bytes < 1:
        raise InputError(f"tile_bytes must be positive, got {tile_bytes}")
    hooks = AttentionHooks(observers, tile_bytes)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(hooks.enter(name)))
            handles.append(module.register_forward_hook(hooks.leave, always_call=True))
        # The fast path of nn.MultiheadAttention is one kernel that never calls scaled_dot_product_attention.
        torch.backends.mha.set_fastpath_enabled(False)
        with hooks:
            yield hooks
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for handle in handles:
            handle.remove()
    if hooks.called and not hooks.layers:
        raise InputError(
            f"{type(model).__name__} was called, but no self-attention went through scaled_dot_product_attention; choose its "
            'fused attention: model.set_attn_implementation("sdpa") in transformers, timm.layers.set_fused_attn(True) '
            "before the model is built in timm, or need_weights=False with nn.MultiheadAttention"
        )


class AttentionHooks(TorchFunctionMode):
    """What `attention_hooks` yields: which layers were seen.

    Attributes:
        layers: Module path of each self-attention layer.
        skipped: Module paths whose calls were not self-attention. Calls from outside the model pass unseen.
        stop_after: If set, the forward pass ends (with `ForwardStopped`) once this layer has been shown.
    """

    def __init__(self, observers: tuple[AttentionObserver, ...], tile_bytes: int) -> None:
        super().__init__()
        self.layers: list[str] = []
        self.skipped: list[str] = []
        self.stop_after: int | None = None
        self.called = False
        self._observers = observers
        self._tile_bytes = tile_bytes
        self._numbers: dict[tuple[str, int], int] = {}
        self._calls: Counter[str] = Counter()
        self._stack: list[str] = []
        self._workspace = torch.empty(0)

    def enter(self, name: str) -> Callable[..., None]:
        """A forward pre-hook for the module called `name`."""

        def hook(module: nn.Module, args: Any) -> None:
            self.called = True
            if name == "":
                self._stack.clear()
                self._calls.clear()
            self._stack.append(name)

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """The forward hook of every module."""
        if self._stack:
            self._stack.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            # While a mode handles one torch function it does not see those called inside: route the inner call by hand.
            return _with_globals(func, scaled_dot_product_attention=self._attend, has_torch_function=lambda tensors: False)(
                *args, **(kwargs or {})
            )
        return func(*args, **(kwargs or {}))

    def _attend(
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
    ) -> Tensor:
        """Stands in for `scaled_dot_product_attention`, with its arguments and its result."""

        def fused() -> Tensor:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )

        if not self._stack:  # not this model's
            return fused()
        name = self._stack[-1]
        if query.ndim != 4 or query.shape[-2] != key.shape[-2]:
            if name not in self.skipped:
                self.skipped.append(name)
            return fused()
        layer = self._number(name)
        last = layer == self.stop_after
        inputs = (query, key, value, attn_mask)
        gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        modes: list[object] = _get_current_function_mode_stack()
        nested = any(isinstance(mode, AttentionHooks) for mode in modes)
        needs_fused = dropout_p > 0 or gradient or nested
        with torch.no_grad():
            q, k, v = _as_the_kernel_sees(query, key, value, enable_gqa)
            with torch.autocast(query.device.type, enabled=False):
                bias = _bias(attn_mask, q, is_causal)
                output = self._walk(layer, name, q, k, None if needs_fused or last else v, bias, scale)
        if needs_fused:
            output = fused()
        if last:
            self._stack.clear()
            raise ForwardStopped
        assert output is not None
        return output

    def _number(self, name: str) -> int:
        """The layer's number: by module path, and by the count of its calls within one call of the whole model."""
        call = self._calls[name] if self._stack[:1] == [""] else 0
        self._calls[name] += 1
        if (name, call) not in self._numbers:
            self._numbers[name, call] = len(self.layers)
            self.layers.append(name)
        return self._numbers[name, call]

    def _walk(
        self, layer: int, name: str, query: Tensor, key: Tensor, value: Tensor | None, bias: Tensor | None, scale: float | None
    ) -> Tensor | None:
        """Shows every tile to the observers; returns probabilities @ value where there is a value."""
        batch, heads, tokens, dim = query.shape
        scale = 1 / math.sqrt(dim) if scale is None else scale
        dtype = torch.promote_types(query.dtype, torch.float32)
        workspace = self._reserve(dtype, query.device)
        at_once, rows = _tile_shape(batch, heads, tokens, len(workspace))
        if at_once == 0:
            workspace = workspace.new_empty(heads * tokens)
            at_once = rows = 1
        output = None
        if value is not None:  # laid out as the fused kernels do, so that the heads merge without a copy
            output = value.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        for images in _slices(batch, at_once):
            count = images.stop - images.start
            # For one image these are views; several are copied, which costs little for the short sequences it is done for.
            group_query, group_key = (t[images].reshape(count * heads, tokens, dim).to(dtype) for t in (query, key))
            group_value = None if value is None else value[images].reshape(count * heads, tokens, -1).to(dtype)
            for queries in _slices(tokens, rows):
                length = queries.stop - queries.start
                scores = workspace[: count * heads * length * tokens].view(count * heads, length, tokens)
                torch.baddbmm(scores, group_query[:, queries], group_key.mT, beta=0, alpha=scale, out=scores)
                tile = scores.view(count, heads, length, tokens)
                if bias is None:
                    torch.softmax(scores, dim=-1, out=scores)
                else:
                    tile += bias[images, :, queries]
                    empty = scores.amax(dim=-1, keepdim=True) == -torch.inf
                    torch.softmax(scores, dim=-1, out=scores)
                    scores.masked_fill_(empty, 0)  # a query that may attend to nothing attends to nothing
                for observer in self._observers:
                    observer.update(AttentionTile(layer, name, images, queries, tokens, tile))
                if output is not None and group_value is not None:
                    output[images, :, queries] = torch.bmm(scores, group_value).view(count, heads, length, -1).to(output.dtype)
        return output

    def _reserve(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """One tile's memory, kept for the life of the context: fresh pages cost more than the arithmetic."""
        if self._workspace.dtype != dtype or self._workspace.device != device or self._workspace.numel() == 0:
            with torch.inference_mode(False):
                self._workspace = torch.empty(max(1, self._tile_bytes // dtype.itemsize), dtype=dtype, device=device)
        return self._workspace


def _tile_shape(batch: int, heads: int, tokens: int, elements: int) -> tuple[int, int]:
    """Images and queries of a tile: whole images where one fits, else queries of one image; (0, 0) where not one query fits."""
    whole = elements // (heads * tokens * tokens)
    if whole:
        return min(batch, whole), tokens
    rows = elements // (heads * tokens)
    if rows == 0:
        return 0, 0
    return 1, math.ceil(tokens / math.ceil(tokens / rows))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _as_the_kernel_sees(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> list[Tensor]:
    """Queries, keys and values as autocast casts them, each with as many images and heads."""
    tensors, device = [query, key, value], query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        tensors = [t.to(torch.get_autocast_dtype(device)) for t in tensors]
    if enable_gqa:
        tensors = [t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in tensors]
    batch, heads = (max(t.shape[axis] for t in tensors) for axis in (0, 1))
    return [t.expand(batch, heads, -1, -1) for t in tensors]


def _bias(mask: Tensor | None, query: Tensor, is_causal: bool) -> Tensor | None:
    """What is added to the scores, broadcast to (batch, head, query, key) without copies."""
    batch, heads, tokens, _ = query.shape
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=query.device).masked_fill(~mask, -torch.inf)
    if is_causal:
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
        mask = (query.new_zeros(()) if mask is None else mask).masked_fill(future, -torch.inf)
    return None if mask is None else mask.expand(batch, heads, tokens, tokens)


def _with_globals(function: Any, **names: Any) -> FunctionType:
    """A copy of a Python function that finds other objects under some global names; the original is left alone."""
    copy = FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
