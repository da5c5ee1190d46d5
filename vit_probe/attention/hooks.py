"""The one mechanism that sees attention: `attention_hooks`.

It stands where every Vision Transformer of today computes its attention, in
`torch.nn.functional.scaled_dot_product_attention`, and so receives the true queries, keys and values of each layer, whichever
library wrote the model. Attention is computed there tile by tile; each tile is shown to the observers and then multiplied with
the values, so that one softmax serves the measures and the model's own output, and no N x N map outlives its tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from vit_probe.attention.intercept import AttentionCall, AttentionRouter, intercepted
from vit_probe.attention.tiles import TILE_BYTES, AttentionInputs, AttentionObserver, LayerObserver, TiledAttention
from vit_probe.attention.verify import verified
from vit_probe.errors import InputError

__all__ = [
    "AttentionHooks",
    "attention_hooks",
    "check_attention_captured",
]


@contextmanager
def attention_hooks(
    model: nn.Module, *observers: AttentionObserver, tile_bytes: int = TILE_BYTES, verify: bool = False
) -> Iterator[AttentionHooks]:
    """Shows the attention of every self-attention layer to `observers` while `model` is called within the context.

    The model stays as it is, fused attention included, and returns what it would have returned, within rounding. Where
    gradients flow or attention dropout is active, its output is that of the fused attention itself, and observers see the
    probabilities before dropout. Calls that are not self-attention (pooling heads, cross- and class-attention: the queries are
    others than the keys) pass through and are listed in `skipped`, with the reason. Compiled models run uncompiled meanwhile.
    At the end, also after an exception, every trace is gone.

    Args:
        model: Any module whose attention goes through `scaled_dot_product_attention`.
        observers: Shown each tile in turn.
        tile_bytes: Upper bound of a tile's size; one query of one head of one image is the least.
        verify: Run each call of the whole model a second time with everything switched off, with the same random numbers, and
            compare the outputs.

    Raises:
        InputError: At the end of the context, if the model was called and the attention of some layers, or all, was not seen;
            with `verify`, if only parts of the model were called.
        RuntimeError: With `verify`, if the outputs differ by more than rounding.
    """
    if tile_bytes < 1:
        raise InputError(f"tile_bytes must be positive, got {tile_bytes}")
    hooks = AttentionHooks(observers, tile_bytes)
    with verified(model) if verify else nullcontext() as compared, intercepted(model, hooks):
        yield hooks
    check_attention_captured(model, hooks)
    if compared == [] and hooks.layers and hooks.stop_after is None:
        raise InputError(
            "verify=True compares calls of the whole model, but only parts of it were called; call the model itself"
        )


class AttentionHooks(AttentionRouter):
    """What `attention_hooks` yields: which layers were seen.

    Attributes:
        layers: Module path of each self-attention layer.
        skipped: Module paths whose calls were not self-attention, with the reason. Calls from outside the model pass unseen.
        stop_after: If set, the forward pass ends (with `ForwardStopped`) once this layer has been shown.
    """

    def __init__(self, observers: tuple[AttentionObserver, ...], tile_bytes: int) -> None:
        super().__init__()
        self._observers = observers
        self._compute = TiledAttention(tile_bytes)

    def attend(self, call: AttentionCall) -> Tensor:
        """Shows the call's attention to the observers; the fused attention's own result where gradients or dropout need it."""
        inputs = (call.query, call.key, call.value, call.mask)
        gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        modes: list[object] = _get_current_function_mode_stack()
        nested = any(isinstance(mode, AttentionHooks) for mode in modes)
        needs_fused = call.dropout_p > 0 or gradient or nested
        unused = call.shown_only or call.layer == self.stop_after
        with torch.no_grad():
            q, k, v = _as_the_kernel_sees(call)
            with torch.autocast(call.query.device.type, enabled=False):
                bias = _bias(call.mask, q, call.is_causal)
                scale = 1 / math.sqrt(q.shape[-1]) if call.scale is None else call.scale
                layer = AttentionInputs(call.layer, call.name, q, k, bias, scale)
                watching = [one for one in self._observers if not isinstance(one, LayerObserver) or one.begin_layer(layer)]
                output = self._compute(layer, None if needs_fused or unused else v, watching) if watching else None
        if (needs_fused and not call.shown_only) or not (watching or unused):
            return call.fused()
        return v if output is None else output


def _as_the_kernel_sees(call: AttentionCall) -> list[Tensor]:
    """Queries, keys and values as autocast casts them, each with as many images and heads."""
    tensors, device = [call.query, call.key, call.value], call.query.device.type
    if torch.is_autocast_enabled(device) and call.query.dtype != torch.float64:
        tensors = [t.to(torch.get_autocast_dtype(device)) for t in tensors]
    if call.enable_gqa:
        tensors = [t.repeat_interleave(call.query.shape[1] // t.shape[1], dim=1) for t in tensors]
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


_REMEDY = (
    'choose its fused attention: model.set_attn_implementation("sdpa") in transformers, '
    "timm.layers.set_fused_attn(True, experimental=True) before the model is built in timm; pass a module as it was before "
    "torch.jit traced or scripted it. A model whose own code computes the softmax, or which was recorded as a graph (CUDA "
    "graphs), cannot be seen into"
)


def check_attention_captured(model: nn.Module, router: AttentionRouter) -> None:
    """Raise InputError if the model was called and its self-attention, or that of some of its layers, was not seen."""
    if router.called and not router.layers:
        raise InputError(_nothing_seen(model, router.skipped))
    if missed := router.missed_modules:
        which = f"{len(missed)} module{'' if len(missed) == 1 else 's'} of {type(model).__name__}"
        raise InputError(
            f"the attention of {which} cannot be seen ({', '.join(missed[:3])}), "
            f"though that of {len(router.layers)} layers can; {_REMEDY}"
        )


def _nothing_seen(model: nn.Module, skipped: Mapping[str, str]) -> str:
    others = ", ".join(f"{name or 'the model'} ({reason})" for name, reason in list(skipped.items())[:3])
    seen = f" (other calls did: {others})" if others else ""
    what = f"{type(model).__name__} was called, but no self-attention went through scaled_dot_product_attention{seen}; "
    if isinstance(model, nn.DataParallel):
        return what + "nn.DataParallel runs its copies in threads of their own: pass model.module"
    return what + _REMEDY
