"""Randomly re-initialised models, as a baseline for what training has changed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import nn

from vit_probe.attention.wrappers import unwrap
from vit_probe.errors import InputError
from vit_probe.tokens.grid import first_parameter

__all__ = ["random_weights"]

_DEVIATION = 0.02


def random_weights(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """A copy of `model` with randomly re-initialised weights; `model` itself is not changed.

    Layers with a `reset_parameters` method (all of torch's, many of timm's) initialise themselves, running statistics
    included. Parameters that no layer initialises, such as class tokens, position tables, LayerScale or layers that
    transformers defines, are drawn from N(0, 0.02^2), the usual initialisation of tokens and positions. So are embeddings,
    which torch would draw from N(0, 1). The scales of norms are set to 1. This is one initialisation for the models of all
    libraries, close to what training starts from, rather than the recipe of any paper; it favours no kind of attention.

    Not changed: buffers that no layer resets, and fixed tables such as those of sines and cosines, recognised as
    parameters without gradient in a model whose others have one.

    Args:
        model: Any module.
        seed: Seed of the random numbers, which are drawn on the CPU and so are the same for every device. The state of
            torch's global generator is restored.

    Returns:
        The copy, on the model's device. Results call it `NAME, random weights (seed SEED)`.

    Raises:
        InputError: If the model cannot be copied, has parameters that are not floating-point, has a layer that cannot be
            reset, or is frozen, so that fixed tables cannot be told from weights.

    References:
        Adebayo et al. 2018, arXiv:1810.03292, section 3 (model parameter randomization test).

    Examples:
        >>> import torch
        >>> trained = nn.Linear(2, 3)
        >>> random = random_weights(trained, seed=1)
        >>> random.name
        'Linear, random weights (seed 1)'
        >>> torch.equal(random.weight, random_weights(trained, seed=1).weight)
        True
    """
    model = unwrap(model)
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
            "requires_grad_(True) on the parameters that were trained"
        )
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name, parameter in copy.named_parameters():
            if not parameter.is_floating_point():
                raise InputError(
                    f"{name} of {type(model).__name__} is {parameter.dtype}, and random weights are floating-point; load "
                    "the model without quantisation"
                )
            if parameter in fixed:
                continue
            if parameter.ndim == 1 and name.rpartition(".")[2] == "weight":
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=_DEVIATION)
        for module, reset in reversed(resets.items()):  # submodules first, as when a model is built
            try:
                reset()
            except Exception as error:
                raise InputError(f"a {type(module).__name__} cannot be reset ({type(error).__name__}: {error})") from None
    name = getattr(model, "name", type(model).__name__)
    copy.name = f"{name}, random weights (seed {seed})"  # type: ignore[assignment]
    return copy.to(home)


def _reset_of(module: nn.Module) -> Callable[[], object] | None:
    """The method that initialises a layer's parameters, if it has one; in `nn.MultiheadAttention` its name is private."""
    if isinstance(module, nn.Embedding):
        return None
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
