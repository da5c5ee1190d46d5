"""The self-check of `attention_hooks`: the same call without hooks must give the same output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vit_probe.errors import InputError

__all__ = ["verify_outputs"]

# Largest difference relative to the output's largest magnitude: at least five times what models of 9 to 24 layers showed.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 0.01, torch.bfloat16: 0.08}


@contextmanager
def verify_outputs(model: nn.Module) -> Iterator[list[bool]]:
    """Repeat each call of the whole model without attention hooks, inside the context, and compare the outputs.

    Enter this context before `intercept_attention`. Both calls draw the same random numbers. A call that ends early, by an
    exception, is not checked.

    Yields:
        A list that gets an entry for each call that was compared.

    Raises:
        RuntimeError: If the outputs differ by more than rounding, or in shape.
        InputError: If the output has no tensors to compare.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    states: list[dict[torch.device, Tensor]] = []
    comparisons: list[bool] = []
    repeating = False  # the repeated call runs these hooks too

    def before(module: nn.Module, args: Any) -> None:
        if not repeating:
            states[:] = [_random_states(module)]

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        nonlocal repeating
        if repeating or not states:
            return
        repeating, hooked_fastpath, states_after = True, torch.backends.mha.get_fastpath_enabled(), _random_states(module)
        try:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            _set_random_states(states.pop())
            with torch.no_grad(), torch._C.DisableTorchFunction():  # switches off the interception, which is a function mode
                expected = module(*args, **kwargs)
        finally:
            repeating = False
            torch.backends.mha.set_fastpath_enabled(hooked_fastpath)
            _set_random_states(states_after)
        _compare(output, expected, _tolerance(module))
        comparisons.append(True)

    handles = [model.register_forward_pre_hook(before), model.register_forward_hook(after, with_kwargs=True)]
    try:
        yield comparisons
    finally:
        for handle in handles:
            handle.remove()


def _tolerance(module: nn.Module) -> float:
    """The tolerance of the coarsest type that the model computes in."""
    types = {parameter.dtype for parameter in module.parameters()}
    for device in {parameter.device.type for parameter in module.parameters()}:
        if torch.is_autocast_enabled(device):
            types.add(torch.get_autocast_dtype(device))
    return max((_ROUNDING[dtype] for dtype in types if dtype in _ROUNDING), default=0.0)


def _compare(hooked: Any, expected: Any, tolerance: float) -> None:
    ours, theirs = ([leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)] for value in (hooked, expected))
    if not theirs:
        raise InputError(f"the model returns a {type(expected).__name__} without tensors, which verify=True cannot compare")
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        raise RuntimeError(
            f"with hooks the model returns tensors of shapes {[tuple(t.shape) for t in ours]}, without them of "
            f"{[tuple(t.shape) for t in theirs]}"
        )
    for one, other in zip((t.detach().cpu() for t in ours), (t.cpu() for t in theirs), strict=True):
        allowed = max(tolerance, _ROUNDING.get(other.dtype, 0.0))
        difference = (one.double() - other.double()).abs()
        scale = float(other.double().abs().nan_to_num(0, 0, 0).max()) if other.numel() else 0.0
        same = (one == other) | (one.isnan() & other.isnan()) | (difference <= allowed * scale)
        if not bool(same.all()):
            largest = float(difference.nan_to_num(torch.inf).max())
            raise RuntimeError(
                f"the model's output with hooks differs by up to {largest:.3g} from its output without them, but rounding "
                f"explains only {allowed * scale:.3g}: either two calls of this model differ anyway, or what was captured is "
                "not its attention; do not trust the numbers"
            )


def _random_states(module: nn.Module) -> dict[torch.device, Tensor]:
    """The states of the random number generators of the CPU and of the model's devices."""
    devices = {torch.device("cpu")} | {parameter.device for parameter in module.parameters()}
    return {device: _generator(device).get_rng_state(*_device_argument(device)) for device in devices}


def _set_random_states(states: Mapping[torch.device, Tensor]) -> None:
    for device, state in states.items():
        _generator(device).set_rng_state(state, *_device_argument(device))


def _generator(device: torch.device) -> Any:
    return torch if device.type == "cpu" else torch.get_device_module(device)


def _device_argument(device: torch.device) -> list[torch.device]:
    """The argument that selects one of several devices of a type, where its module takes one."""
    return [device] if device.type in ("cuda", "xpu") else []
