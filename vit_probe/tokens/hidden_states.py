"""The patch tokens that pass from block to block, seen in the same forward pass as attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vit_probe.attention.intercept import ForwardStopped, evaluated
from vit_probe.errors import TokensNotSeen
from vit_probe.tokens.grid import TokenGrid, first_convolution, first_parameter, first_tensor
from vit_probe.tokens.locate import TokenLayout

__all__ = [
    "TokenObserver",
    "as_sequence",
    "block_path",
    "patch_tokens",
    "token_hooks",
]


@runtime_checkable
class TokenObserver(Protocol):
    """A measure that is shown hidden tokens, the layers of each forward pass in order.

    These are the patch tokens that a block passes on: after its residual connections, before the final normalisation. Prefix
    tokens are left out; the tokens that enter the first block are not shown. The images come in order. In a model that merges
    patches, later layers have fewer of them. The tokens are the model's own: they are not to be written to.
    """

    def update_tokens(self, layer: int, tokens: Float[Tensor, "image patch dim"]) -> None: ...


@contextmanager
def token_hooks(model: nn.Module, found: TokenLayout, observers: Sequence[TokenObserver]) -> Iterator[None]:
    """Shows the patch tokens of every layer to `observers` while `model` is called within the context.

    Each call of the model ends, with `ForwardStopped`, once the last block's tokens have been shown. Without observers nothing
    is done. At the end of the context, also after an exception, every trace is gone.

    Args:
        model: Any Vision Transformer.
        found: What `survey` found for images of this size.
        observers: Shown each layer in turn.

    Raises:
        TokensNotSeen: At once, if the model's blocks cannot be told apart; while the model runs, if they do not pass the tokens
            on from one to the next.
    """
    if not observers:
        yield
        return
    paths = [block_path(model, found, layer) for layer in range(len(found.layers))]
    passing = _Passing(found, [path in found.seq_first for path in paths], observers)
    handles = [
        model.register_forward_pre_hook(passing.begin, with_kwargs=True),
        model.register_forward_hook(passing.end),
    ]
    try:
        for layer, path in enumerate(paths):
            show = partial(passing.show, layer)
            handles.append(model.get_submodule(path).register_forward_hook(show, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Passing:
    """The tokens of one forward pass on their way from block to block."""

    def __init__(self, found: TokenLayout, seq_first: Sequence[bool], observers: Sequence[TokenObserver]) -> None:
        self._found = found
        self._token_first = seq_first
        self._observers = observers
        self._images = 0
        self._next = 0  # the layer whose tokens come next
        self._passed: Tensor | None = None  # what the block before passed on

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        images = first_tensor((*args, *kwargs.values()))
        self._images = 0 if images is None else len(images)
        self._next, self._passed = 0, None

    def show(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        given = first_tensor((*args, *kwargs.values()))
        if layer != self._next or not self._takes_what_was_passed(layer, given):
            raise TokensNotSeen(
                f"the block around {self._found.layers[layer]} does not take the tokens from the block before it; what that "
                "one returns is not what passes from layer to layer"
            )
        passed = first_tensor(output)
        tokens = self._sequence(layer, passed)
        for observer in self._observers:
            observer.update_tokens(layer, tokens)
        self._next, self._passed = layer + 1, passed
        if self._next == len(self._found.layers):
            self._passed = None
            raise ForwardStopped

    def _sequence(self, layer: int, tokens: Tensor | None) -> Float[Tensor, "image patch dim"]:
        return as_sequence(tokens, self._images, self._found, layer, seq_first=self._token_first[layer])

    def _takes_what_was_passed(self, layer: int, given: Tensor | None) -> bool:
        """Whether a block is given the patch tokens of the one before; of another shape, as merged ones are, they may be."""
        before = self._passed
        if given is None or before is None or given is before or given.shape != before.shape:
            return True
        return torch.equal(self._sequence(layer, given), self._sequence(layer, before))

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Called where the forward pass did not end at the last block."""
        name = self._found.layers[self._next]
        raise TokensNotSeen(f"{type(module).__name__} passes its images by the block around {name}, or calls it in its own way")


class _Reached(BaseException):
    """Ends a forward pass once the tokens are there; not an Exception, lest a model catch it."""


def patch_tokens(
    model: nn.Module, images: Float[Tensor, "image channel height width"], found: TokenLayout, after_layers: int
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
    tokens = as_sequence(passed[0] if passed else None, len(images), found, layer, seq_first=path in found.seq_first)
    return tokens, found.grid_of(layer)


def block_path(model: nn.Module, found: TokenLayout, layer: int) -> str:
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
    tokens: Tensor | None, images: int, found: TokenLayout, layer: int, *, seq_first: bool
) -> Float[Tensor, "image patch dim"]:
    """The patches among what a block passes on, whichever way it lays out images, tokens and rows.

    Args:
        tokens: What the block passes on.
        images: How many.
        found: What `survey` found for images of this size.
        layer: Whose tokens these are.
        seq_first: Whether the block has the tokens before the images; as many images as tokens do not tell.

    Raises:
        TokensNotSeen: If these are not the tokens of the layer's grid.
    """
    grid = found.grid_of(layer)
    shape = None if tokens is None else tuple(tokens.shape)
    if tokens is not None and shape is not None:
        if shape[:3] == (images, grid.rows, grid.cols) and len(shape) == 4:
            return tokens.flatten(1, 2)
        sequence = tokens.transpose(0, 1) if seq_first and len(shape) == 3 else tokens
        if len(shape) == 3 and sequence.shape[:2] == (images, grid.num_tokens):
            return sequence[:, grid.num_prefix_tokens :]
    raise TokensNotSeen(
        f"the block around {found.layers[layer]} passes on a tensor of shape {shape}, which does not hold the tokens of {grid}"
    )
