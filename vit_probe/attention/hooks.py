"""`attention_hooks`: show a model's attention to observers while it runs.

Nearly every current Vision Transformer computes its attention in `torch.nn.functional.scaled_dot_product_attention`.
Intercepting that function gives the true queries, keys and values of each layer, whichever library wrote the model. The
attention is then computed tile by tile. Each tile is shown to the observers and multiplied by the values, so that one softmax
serves both the measures and the model's output, and no N x N map is held.

Models that compute the softmax in code of their own hold such maps anyway. There the softmax is intercepted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from numbers import Real

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from vit_probe.attention.arguments import check_model, check_observers
from vit_probe.attention.calls import AttentionCall, UnfusedCall
from vit_probe.attention.intercept import AttentionInterceptor, intercept_attention
from vit_probe.attention.tiles import TILE_BYTES, AttentionInputs, AttentionObserver, LayerObserver, TiledAttention
from vit_probe.attention.verify import verify_outputs
from vit_probe.errors import InputError

__all__ = ["AttentionHooks", "attention_hooks", "check_attention_captured"]


@contextmanager
def attention_hooks(
    model: nn.Module, *observers: AttentionObserver, tile_bytes: int = TILE_BYTES, verify: bool = False
) -> Iterator[AttentionHooks]:
    """Show the attention of every self-attention layer to `observers` while `model` runs inside the context.

    The model is not modified: its fused attention stays on, and its output is the same within rounding. Where gradients flow
    or attention dropout is active, the output is that of the fused attention itself, and observers get the probabilities
    before dropout. Attention that is not self-attention (pooling heads, cross- and class-attention, whose queries and keys
    differ) runs unchanged and is listed in `skipped` with the reason. Compiled models run uncompiled inside the context. All
    hooks are removed at the end, also after an exception.

    Layers may also compute their attention in code of their own, as a softmax over the keys that is then multiplied by the
    values. They are listed in `unfused`. Where the weights are changed in between (heads are mixed, two softmaxes subtracted),
    there is no attention of one softmax to show, and nothing is. A module that attends several times in a forward pass counts
    as several layers here; measures refuse models in which these do not follow one another.

    Args:
        model: Any module whose attention goes through `scaled_dot_product_attention`, or through a softmax.
        observers: Objects with a method `update(tile)`, called in turn with each `AttentionTile`.
        tile_bytes: Upper bound on the size of a tile, which holds at least one query of one head of one image.
        verify: Repeat each call of the whole model without hooks, with the same random numbers, and compare the outputs.

    Yields:
        The hooks, which list the layers.

    Raises:
        InputError: At the start of the context, if an argument is of another type, or another thread is measuring the model. At
            its end, if the model was called and the attention of some or all of its layers was not captured; with `verify`, if
            only parts of the model were called.
        RuntimeError: With `verify`, if the outputs differ by more than rounding.

    Examples:
        >>> import torch
        >>> from vit_probe import VisionTransformer, ViTConfig, attention_hooks
        >>> class LargestWeight:
        ...     def __init__(self):
        ...         self.by_layer = {}
        ...
        ...     def update(self, tile):
        ...         largest = tile.probabilities.max().item()
        ...         self.by_layer[tile.name] = max(largest, self.by_layer.get(tile.name, 0.0))
        >>> model = VisionTransformer(ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3))
        >>> observer = LargestWeight()
        >>> with torch.no_grad(), attention_hooks(model, observer) as hooks:
        ...     logits = model(torch.randn(2, 3, 32, 32))
        >>> hooks.layers
        ['blocks.0.attn', 'blocks.1.attn']
        >>> list(observer.by_layer) == hooks.layers
        True
    """
    check_model(model, observers[0] if observers else None)
    check_observers(observers)
    if not isinstance(tile_bytes, Real) or tile_bytes < 1:
        raise InputError(f"tile_bytes must be a positive number, got {tile_bytes!r}")
    hooks = AttentionHooks(observers, tile_bytes)
    # verify_outputs notes the settings of the untouched model, so it must come before the interception changes them.
    with verify_outputs(model) if verify else nullcontext() as comparisons, intercept_attention(model, hooks):
        yield hooks
    # Not in a `finally`: an exception of the model's own says more than that no attention was captured.
    check_attention_captured(model, hooks)
    if comparisons == [] and hooks.layers and hooks.stop_after is None:
        raise InputError(
            "verify=True compares calls of the whole model, but only parts of it were called; call the model itself"
        )


class AttentionHooks(AttentionInterceptor):
    """The hooks that `attention_hooks` yields, with the layers that made calls.

    Attributes:
        layers: Module path of each self-attention layer.
        unfused: Module paths of those layers that compute their attention in code of their own, by a softmax.
        skipped: Module paths of other attention, with the reason. At the end of the context also modules that hold projections
            of queries, keys and values but whose attention was not seen. Calls from outside the model are ignored.
        stop_after: If set, the forward pass ends (with `ForwardStopped`) after this layer was shown.
    """

    def __init__(self, observers: tuple[AttentionObserver, ...], tile_bytes: int) -> None:
        super().__init__()
        self._observers = observers
        self._compute_tiles = TiledAttention(tile_bytes)

    def handle_self_attention(self, call: AttentionCall) -> Tensor:
        """Show the attention to the observers and return the layer's output."""
        inputs = (call.query, call.key, call.value, call.mask)
        has_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        # Hooks of an enclosing context see this call only if the fused attention is called.
        modes: list[object] = _get_current_function_mode_stack()
        is_nested = any(isinstance(mode, AttentionHooks) for mode in modes)
        # Tiles have neither a graph nor dropout, and a model that computed the softmax itself goes on with it.
        needs_own = has_gradient or call.dropout_p > 0 or is_nested or isinstance(call, UnfusedCall)
        output_unused = call.discard_output or call.layer == self.stop_after
        with torch.no_grad():
            query, key, value = _cast_and_expand(call)
            # The casts of autocast are done; the softmax and the observers compute in the precision of the tiles.
            with torch.autocast(call.query.device.type, enabled=False):
                bias = _additive_bias(call.mask, query, call.is_causal)
                scale = 1 / math.sqrt(query.shape[-1]) if call.scale is None else call.scale
                layer = AttentionInputs(call.layer, call.name, query, key, bias, scale)
                observers = [one for one in self._observers if not isinstance(one, LayerObserver) or one.begin_layer(layer)]
                tiled_value = None if needs_own or output_unused else value
                output = self._compute_tiles(layer, tiled_value, observers) if observers else None
        if output is not None:
            return output
        if call.discard_output or (output_unused and not needs_own):
            return value  # never used, but of the right shape
        return call.output()


def _cast_and_expand(call: AttentionCall) -> list[Tensor]:
    """Queries, keys and values cast as autocast casts them, and expanded to the same number of images and heads."""
    tensors, device = [call.query, call.key, call.value], call.query.device.type
    # A function mode gets the tensors before autocast has cast them. Autocast leaves float64 alone.
    if torch.is_autocast_enabled(device) and call.query.dtype != torch.float64:
        tensors = [t.to(torch.get_autocast_dtype(device)) for t in tensors]
    if call.enable_gqa:
        tensors = [t.repeat_interleave(call.query.shape[1] // t.shape[1], dim=1) for t in tensors]
    batch, heads = (max(t.shape[axis] for t in tensors) for axis in (0, 1))
    return [t.expand(batch, heads, -1, -1) for t in tensors]


def _additive_bias(mask: Tensor | None, query: Tensor, is_causal: bool) -> Tensor | None:
    """The term added to the scores, broadcast to (batch, head, query, key) without copies."""
    batch, heads, tokens, _ = query.shape
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=query.device).masked_fill(~mask, -torch.inf)
    if is_causal:
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
        mask = (query.new_zeros(()) if mask is None else mask).masked_fill(future, -torch.inf)
    return None if mask is None else mask.expand(batch, heads, tokens, tokens)


def check_attention_captured(model: nn.Module, interceptor: AttentionInterceptor) -> None:
    """Check that the self-attention of all layers of a model was captured, if the model was called at all.

    Args:
        model: The model whose attention was intercepted.
        interceptor: What intercepted it, after the context of `intercept_attention`.

    Raises:
        InputError: If no self-attention was captured, or none in modules whose class attends elsewhere in the model.

    Examples:
        >>> import torch
        >>> from vit_probe.attention.intercept import intercept_attention
        >>> model, hooks = torch.nn.Linear(4, 4), AttentionHooks((), tile_bytes=1024)
        >>> check_attention_captured(model, hooks)  # passes: the model was not called
        >>> with intercept_attention(model, hooks):
        ...     output = model(torch.ones(1, 4))
        >>> check_attention_captured(model, hooks)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vit_probe.errors.InputError: Linear was called, but no self-attention could be captured; ...
    """
    if interceptor.called and not interceptor.layers:
        raise InputError(_no_attention_message(model, interceptor.skipped))
    # A model with some layers missing would give results for the others that look complete.
    if missed := interceptor.missed_modules:
        modules = f"{len(missed)} module{'' if len(missed) == 1 else 's'} of {type(model).__name__}"
        raise InputError(
            f"the attention of {modules} could not be captured ({', '.join(missed[:3])}), "
            f"though that of {len(interceptor.layers)} layers could; {_REMEDY}"
        )


_REMEDY = (
    'enable fused attention: model.set_attn_implementation("sdpa") in transformers, or '
    "timm.layers.set_fused_attn(True, experimental=True) before the model is built in timm; if torch.jit traced or scripted a "
    "module, pass the original one. Attention can be captured if it goes through scaled_dot_product_attention, or through a "
    "softmax over all pairs of tokens that then multiplies the values unchanged, and was not recorded as a graph (CUDA graphs)"
)


def _no_attention_message(model: nn.Module, skipped: Mapping[str, str]) -> str:
    listed = ", ".join(f"{name or 'the model'} ({reason})" for name, reason in list(skipped.items())[:3])
    others = f" (other attention: {listed})" if listed else ""
    message = f"{type(model).__name__} was called, but no self-attention could be captured{others}; "
    if isinstance(model, nn.DataParallel):
        # Modes and hooks belong to one thread.
        return message + "nn.DataParallel runs its replicas in threads of their own: pass model.module"
    return message + _REMEDY
