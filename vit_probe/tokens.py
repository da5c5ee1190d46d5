"""The patch tokens between the layers of a model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from vit_probe.errors import InputError
from vit_probe.geometry import TokenGrid, first_convolution, first_parameter
from vit_probe.routing import evaluated
from vit_probe.survey import Survey

__all__ = ["as_sequence", "block_path", "first_tensor", "patch_tokens"]


class _Reached(BaseException):
    """Ends a forward pass once the tokens are there; not an Exception, lest a model catch it."""


def patch_tokens(
    model: nn.Module, images: Float[Tensor, "image channel height width"], found: Survey, after_layers: int
) -> tuple[Float[Tensor, "image patch dim"], TokenGrid]:
    """The patch tokens that have passed the first `after_layers` layers, and their grid.

    With 0 layers these are the tokens that enter the first layer. They are taken as they go from block to block: after a
    block's residual connections, before the final normalisation.

    Args:
        model: Any Vision Transformer.
        images: On the CPU or the model's device.
        found: What `survey` found for images of this size.
        after_layers: From 0 to the number of layers.

    Raises:
        InputError: If the model's blocks cannot be told apart, or what they pass on are not the tokens.
    """
    layer = max(after_layers - 1, 0)
    block = model.get_submodule(block_path(model, found, layer))
    passed: list[Any] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        passed.append(first_tensor((*args, *kwargs.values())))
        raise _Reached

    def after(module: nn.Module, args: Any, output: Any) -> None:
        passed.append(first_tensor(output))
        raise _Reached

    if after_layers == 0:
        handle = block.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = block.register_forward_hook(after)
    try:
        with evaluated(model), suppress(_Reached):
            model(images.to(first_parameter(model)))
    finally:
        handle.remove()
    grid = found.grid_of(layer)
    return as_sequence(passed[0] if passed else None, len(images), grid, found.layers[layer]), grid


def block_path(model: nn.Module, found: Survey, layer: int) -> str:
    """The path of the block around an attention layer, such as `blocks.0` around `blocks.0.attn`.

    It is the largest module with a forward pass of its own that holds no other attention layer, nor the first convolution.

    Raises:
        InputError: If there is none: a module is called for several layers, or the model calls the attention itself.
    """
    path = found.layers[layer]
    stem, convolution = first_convolution(model)
    others = [*found.layers[:layer], *found.layers[layer + 1 :], *found.skipped, *([stem] if convolution else [])]
    parts = path.split(".") if path else []
    for length in range(1, len(parts) + 1):
        ancestor = ".".join(parts[:length])
        is_list = type(model.get_submodule(ancestor)).forward is nn.Module.forward
        if not is_list and not any(f"{other}.".startswith(f"{ancestor}.") for other in others):
            return ancestor
    raise InputError(f"layer {layer} ({path or 'the model itself'}) of {type(model).__name__} has no block of its own")


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor of numbers that are not whole in what a module is given or returns, one or several; None if none is."""
    if not isinstance(values, list | tuple):
        values = (values,)
    return next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)


def as_sequence(tokens: Tensor | None, images: int, grid: TokenGrid, name: str) -> Float[Tensor, "image patch dim"]:
    """The patches among what a block passes on, whichever way it lays out images, tokens and rows.

    Args:
        tokens: What the block passes on.
        images: How many.
        grid: Where the layer's tokens lie.
        name: Path of the layer's module, for the message.

    Raises:
        InputError: If these are not the tokens of the grid.
    """
    shape = None if tokens is None else tuple(tokens.shape)
    if tokens is not None and shape is not None:
        if shape[:3] == (images, grid.rows, grid.cols) and len(shape) == 4:
            return tokens.flatten(1, 2)
        if len(shape) == 3 and shape[:2] == (images, grid.num_tokens):
            return tokens[:, grid.num_prefix_tokens :]
        if len(shape) == 3 and shape[:2] == (grid.num_tokens, images):
            return tokens[grid.num_prefix_tokens :].transpose(0, 1)
    raise InputError(f"the block around {name} passes on a tensor of shape {shape}, which does not hold the tokens of {grid}")
