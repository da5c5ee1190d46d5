"""The patch tokens between the layers of a model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from vit_probe.errors import TokensNotSeen
from vit_probe.geometry import TokenGrid, first_convolution, first_parameter, first_tensor
from vit_probe.routing import evaluated
from vit_probe.survey import Survey

__all__ = ["as_sequence", "block_path", "patch_tokens"]


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
        TokensNotSeen: If the model's blocks cannot be told apart, or what they pass on are not the tokens.
    """
    layer = max(after_layers - 1, 0)
    path = block_path(model, found, layer)
    block = model.get_submodule(path)
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
    tokens = as_sequence(passed[0] if passed else None, len(images), found, layer, token_first=path in found.token_first)
    return tokens, found.grid_of(layer)


def block_path(model: nn.Module, found: Survey, layer: int) -> str:
    """The path of the block around an attention layer, such as `blocks.0` around `blocks.0.attn`.

    It is the largest module with a forward pass of its own that holds no other attention layer, nor the first convolution;
    in a model of one layer the largest of those that stand alone in a list, if any does: what is around may hold the final
    norm.

    Raises:
        TokensNotSeen: If there is none: a module is called for several layers, or the model calls the attention itself.
    """
    path = found.layers[layer]
    stem, convolution = first_convolution(model)
    others = [*found.layers[:layer], *found.layers[layer + 1 :], *found.skipped, *([stem] if convolution else [])]
    parts = path.split(".") if path else []
    around = []
    for length in range(1, len(parts) + 1):
        ancestor = ".".join(parts[:length])
        is_list = type(model.get_submodule(ancestor)).forward is nn.Module.forward
        if not is_list and not any(f"{other}.".startswith(f"{ancestor}.") for other in others):
            around.append(ancestor)
    if len(found.layers) == 1:
        around = [path for path in around if _stands_alone(model.get_submodule(path.rpartition(".")[0]))] or around
    if around:
        return around[0]
    raise TokensNotSeen(f"layer {layer} ({path or 'the model itself'}) of {type(model).__name__} has no block of its own")


def _stands_alone(parent: nn.Module) -> bool:
    return isinstance(parent, nn.ModuleList | nn.Sequential) and len(parent) == 1


def as_sequence(
    tokens: Tensor | None, images: int, found: Survey, layer: int, *, token_first: bool
) -> Float[Tensor, "image patch dim"]:
    """The patches among what a block passes on, whichever way it lays out images, tokens and rows.

    Args:
        tokens: What the block passes on.
        images: How many.
        found: What `survey` found for images of this size.
        layer: Whose tokens these are.
        token_first: Whether the block has the tokens before the images; as many images as tokens do not tell.

    Raises:
        TokensNotSeen: If these are not the tokens of the layer's grid.
    """
    grid = found.grid_of(layer)
    shape = None if tokens is None else tuple(tokens.shape)
    if tokens is not None and shape is not None:
        if shape[:3] == (images, grid.rows, grid.cols) and len(shape) == 4:
            return tokens.flatten(1, 2)
        sequence = tokens.transpose(0, 1) if token_first and len(shape) == 3 else tokens
        if len(shape) == 3 and sequence.shape[:2] == (images, grid.num_tokens):
            return sequence[:, grid.num_prefix_tokens :]
    raise TokensNotSeen(
        f"the block around {found.layers[layer]} passes on a tensor of shape {shape}, which does not hold the tokens of {grid}"
    )
