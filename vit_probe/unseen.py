"""What to say where a model's attention cannot be seen."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from vit_probe.errors import InputError
from vit_probe.routing import AttentionRouter

__all__ = ["check_seen"]

_REMEDY = (
    'choose its fused attention: model.set_attn_implementation("sdpa") in transformers, '
    "timm.layers.set_fused_attn(True, experimental=True) before the model is built in timm; pass a module as it was before "
    "torch.jit traced or scripted it. A model whose own code computes the softmax, or which was recorded as a graph (CUDA "
    "graphs), cannot be seen into"
)


def check_seen(model: nn.Module, router: AttentionRouter) -> None:
    """Raise InputError if the model was called and its self-attention, or that of some of its layers, was not seen."""
    if router.called and not router.layers:
        raise InputError(_nothing_seen(model, router.skipped))
    if hidden := router.hidden:
        which = f"{len(hidden)} module{'' if len(hidden) == 1 else 's'} of {type(model).__name__}"
        raise InputError(
            f"the attention of {which} cannot be seen ({', '.join(hidden[:3])}), "
            f"though that of {len(router.layers)} layers can; {_REMEDY}"
        )


def _nothing_seen(model: nn.Module, skipped: Mapping[str, str]) -> str:
    others = ", ".join(f"{name or 'the model'} ({reason})" for name, reason in list(skipped.items())[:3])
    seen = f" (other calls did: {others})" if others else ""
    what = f"{type(model).__name__} was called, but no self-attention went through scaled_dot_product_attention{seen}; "
    if isinstance(model, nn.DataParallel):
        return what + "nn.DataParallel runs its copies in threads of their own: pass model.module"
    return what + _REMEDY
