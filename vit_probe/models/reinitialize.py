"""The same architecture with weights that no training has touched, to tell what training put there from what it found."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import nn

from vit_probe.errors import InputError
from vit_probe.tokens.grid import first_parameter

__all__ = ["random_weights"]

_DEVIATION = 0.02


def random_weights(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """A copy of `model` with all its weights drawn anew; `model` itself stays as it is.

    Every layer initialises itself as the class it is of does when it is made: what has a `reset_parameters` (all layers of
    torch, many of timm) is reset by it, running statistics included. All that no layer initialises, such as a class token, a
    table of positions, LayerScale or a layer of transformers' own, is drawn from N(0, 0.02^2), the usual start of tokens and
    positions; so are embeddings, which torch itself starts at N(0, 1); and the scales of a norm are 1. This is one start for
    models of all libraries, near to what training begins with, and not the recipe of any paper; in particular no start that
    prefers one kind of attention.

    Left as they are: buffers that no layer resets, and tables that are no part of training (parameters without gradient among
    others that have one), such as those of sines and cosines.

    Args:
        model: Any module.
        seed: Of the draws, which are made on the CPU: the same on every device. torch's own state is as it was afterwards.

    Returns:
        The copy, on the model's device, called `NAME, random weights (seed SEED)` in what is measured of it.

    Raises:
        InputError: If the model cannot be copied, holds parameters that are no floating-point numbers, a layer cannot be
            reset, or all is without gradient, so that fixed tables cannot be told from frozen ones.

    References:
        Adebayo et al. 2018, arXiv:1810.03292, section 3 (what does not change with the weights says nothing of the model).
    """
    home = first_parameter(model).device
    try:
        copy = deepcopy(model).to("cpu")
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {reason}); pass a model as it was built, "
            "before any forward pass, compilation or wrapping"
        ) from None
    resets = {module: reset for module in copy.modules() if (reset := _reset_of(module)) is not None}
    reset_by_layers = {parameter for module in resets for parameter in module.parameters(recurse=False)}
    fixed = {parameter for parameter in copy.parameters() if not parameter.requires_grad} - reset_by_layers
    if fixed and any(not parameter.requires_grad for parameter in reset_by_layers):
        raise InputError(
            f"{type(model).__name__} is frozen, so that tables which were never trained cannot be told from weights; call "
            "requires_grad_(True) on what was trained"
        )
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name, parameter in copy.named_parameters():
            if not parameter.is_floating_point():
                raise InputError(
                    f"{name} of {type(model).__name__} is of {parameter.dtype}, which no random weights are; load "
                    "the model without quantisation"
                )
            if parameter in fixed:
                continue
            if parameter.ndim == 1 and name.rpartition(".")[2] == "weight":
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=_DEVIATION)
        for module, reset in reversed(resets.items()):  # inner ones first, as when a model is built
            try:
                reset()
            except Exception as error:
                raise InputError(f"a {type(module).__name__} cannot be reset ({type(error).__name__}: {error})") from None
    name = getattr(model, "name", type(model).__name__)
    copy.name = f"{name}, random weights (seed {seed})"  # type: ignore[assignment]
    return copy.to(home)


def _reset_of(module: nn.Module) -> Callable[[], object] | None:
    """What initialises a layer anew; `nn.MultiheadAttention` has it under a private name."""
    if isinstance(module, nn.Embedding):
        return None
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
