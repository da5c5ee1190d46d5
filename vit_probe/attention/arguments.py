"""Checks of the model and the observers that users pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from vit_probe.errors import InputError

__all__ = ["check_model", "check_observers"]


def check_model(model: object, second: object = None) -> None:
    """Raise InputError unless `model` is a model with weights; `second` is the argument that it may have been swapped with.

    Examples:
        >>> check_model("demo")
        Traceback (most recent call last):
        vit_probe.errors.InputError: the model must be a torch.nn.Module, got 'demo'; pass load_model('demo')
    """
    if isinstance(model, str | Path):
        raise InputError(f"the model must be a torch.nn.Module, got {str(model)!r}; pass load_model({str(model)!r})")
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        swapped = isinstance(second, nn.Module)
        advice = "swap the two arguments: the model comes first" if swapped else "load_model(...) returns one"
        raise InputError(f"the model must be a torch.nn.Module, got {got}; {advice}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(
            f"{type(model).__name__} has parameters on the meta device, which are shapes without numbers; load its weights"
        )


def check_observers(observers: Sequence[object]) -> None:
    """Raise InputError unless each observer has a method `update(tile)`."""
    for one in observers:
        if isinstance(one, type):
            raise InputError(f"an observer must be an object, got the class {one.__name__}; pass {one.__name__}(...)")
        if not callable(getattr(one, "update", None)):
            got = f"the module {type(one).__name__}" if isinstance(one, nn.Module) else f"{one!r:.80}"
            raise InputError(
                f"an observer must have a method update(tile), which is called with each AttentionTile, got {got}; pass, for "
                "example, mean_attention_distance.observer(grid)"
            )
