"""Attention weights of `nn.MultiheadAttention`, which torch, torchvision and open_clip share."""

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
    """Disable the fast path of `nn.MultiheadAttention` in evaluation mode."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def unfused(model: nn.Module, images: Tensor, layers: tuple[str, ...]) -> Unfused:
    """The weights that each `nn.MultiheadAttention` returns with `need_weights=True`."""
    model, maps = copy.deepcopy(model), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            module.forward = _recording(module.forward, maps, name)
    with without_fast_path():
        result = output(model(images))
    return Unfused({name: maps[name] for name in layers}, result)


def _recording(forward: Callable[..., Any], maps: dict[str, Tensor], name: str) -> Callable[..., Any]:
    def forward_with_weights(*args: Any, **kwargs: Any) -> Any:
        result, maps[name] = forward(*args, **(kwargs | dict(need_weights=True, average_attn_weights=False)))
        return result, maps[name].mean(1) if kwargs.get("average_attn_weights", True) else maps[name]

    return forward_with_weights
