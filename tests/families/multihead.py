"""What torch, torchvision and open_clip share: `nn.MultiheadAttention`, and its own attention weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tests.example_models import output
from tests.families.family import Unfused


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Within the context, attention takes the ordinary way also in evaluation mode."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def unfused(model: nn.Module, images: Tensor, layers: tuple[str, ...]) -> Unfused:
    """The weights that each `nn.MultiheadAttention` returns when it is asked for them."""
    model, maps = copy.deepcopy(model), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            module.forward = _asked(module.forward, maps, name)
    with without_fast_path():
        result = output(model(images))
    return Unfused({name: maps[name] for name in layers}, result)


def _asked(forward: Callable[..., Any], maps: dict[str, Tensor], name: str) -> Callable[..., Any]:
    def ask(*args: Any, **kwargs: Any) -> Any:
        result, maps[name] = forward(*args, **(kwargs | dict(need_weights=True, average_attn_weights=False)))
        return result, maps[name].mean(1) if kwargs.get("average_attn_weights", True) else maps[name]

    return ask
