"""The self-check of `attention_hooks`: the same call with everything switched off must give the same output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vit_probe.errors import InputError

__all__ = ["verified"]

# Largest difference, in units of the output's largest magnitude: five or more times what was seen in 9 to 24 layers.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 0.01, torch.bfloat16: 0.08}


@contextmanager
def verified(model: nn.Module) -> Iterator[list[bool]]:
    """Within the context, each call of the whole model is repeated without hooks, and the outputs are compared.

    It yields a list that gets an entry for each call that was compared.

    The context is to be entered before the hooks that it checks are set. Both calls draw the same random numbers. A call
    that ends early, by an exception, is not checked.

    Raises:
        RuntimeError: If the outputs differ by more than rounding, or in shape.
        InputError: If the output holds no tensor that could be compared.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    states: list[dict[torch.device, Tensor]] = []
    compared: list[bool] = []
    repeating = False

    def before(module: nn.Module, args: Any) -> None:
        if not repeating:
            states[:] = [_random_states(module)]

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        nonlocal repeating
        if repeating or not states:
            return
        repeating, hooked, reached = True, torch.backends.mha.get_fastpath_enabled(), _random_states(module)
        try:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            _set_random_states(states.pop())
            with torch.no_grad(), torch._C.DisableTorchFunction():
                untouched = module(*args, **kwargs)
        finally:
            repeating = False
            torch.backends.mha.set_fastpath_enabled(hooked)
            _set_random_states(reached)
        _compare(output, untouched, _rounding(module))
        compared.append(True)

    handles = [model.register_forward_pre_hook(before), model.register_forward_hook(after, with_kwargs=True)]
    try:
        yield compared
    finally:
        for handle in handles:
            handle.remove()


def _rounding(module: nn.Module) -> float:
    """That of the coarsest type that the model computes in."""
    types = {parameter.dtype for parameter in module.parameters()}
    for device in {parameter.device.type for parameter in module.parameters()}:
        if torch.is_autocast_enabled(device):
            types.add(torch.get_autocast_dtype(device))
    return max((_ROUNDING[kind] for kind in types if kind in _ROUNDING), default=0.0)


def _compare(hooked: Any, untouched: Any, rounding: float) -> None:
    mine, theirs = ([leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)] for value in (hooked, untouched))
    if not theirs:
        raise InputError(f"the model returns a {type(untouched).__name__} without tensors, which verify=True cannot compare")
    if [tensor.shape for tensor in mine] != [tensor.shape for tensor in theirs]:
        raise RuntimeError(
            f"with hooks the model returns tensors of shapes {[tuple(t.shape) for t in mine]}, without them of "
            f"{[tuple(t.shape) for t in theirs]}"
        )
    for one, other in zip((t.detach().cpu() for t in mine), (t.cpu() for t in theirs), strict=True):
        allowed = max(rounding, _ROUNDING.get(other.dtype, 0.0))
        difference = (one.double() - other.double()).abs()
        scale = float(other.double().abs().nan_to_num(0, 0, 0).max()) if other.numel() else 0.0
        same = (one == other) | (one.isnan() & other.isnan()) | (difference <= allowed * scale)
        if not bool(same.all()):
            largest = float(difference.nan_to_num(torch.inf).max())
            raise RuntimeError(
                f"the model's output with hooks differs by up to {largest:.3g} from its output without them, where rounding "
                f"explains {allowed * scale:.3g}; either two calls of this model differ anyway, or what was seen is not its "
                "attention: do not trust the numbers"
            )


def _random_states(module: nn.Module) -> dict[torch.device, Tensor]:
    """The state of the random numbers on the CPU and on the model's devices."""
    devices = {torch.device("cpu")} | {parameter.device for parameter in module.parameters()}
    return {device: _generator(device).get_rng_state(*_index(device)) for device in devices}


def _set_random_states(states: Mapping[torch.device, Tensor]) -> None:
    for device, state in states.items():
        _generator(device).set_rng_state(state, *_index(device))


def _generator(device: torch.device) -> Any:
    return torch if device.type == "cpu" else torch.get_device_module(device)


def _index(device: torch.device) -> list[torch.device]:
    """What tells one of several devices of a type from the others."""
    return [device] if device.type in ("cuda", "xpu") else []
