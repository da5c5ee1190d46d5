"""The patch tokens that pass from block to block, seen in the same forward pass as attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vit_probe.errors import TokensNotSeen
from vit_probe.geometry import first_tensor
from vit_probe.routing import ForwardStopped
from vit_probe.survey import Survey
from vit_probe.tokens import as_sequence, block_path

__all__ = ["TokenObserver", "token_hooks"]


@runtime_checkable
class TokenObserver(Protocol):
    """A measure that is shown hidden tokens, the layers of each forward pass in order.

    These are the patch tokens that a block passes on: after its residual connections, before the final normalisation. Prefix
    tokens are left out; the tokens that enter the first block are not shown. The images come in order. In a model that merges
    patches, later layers have fewer of them. The tokens are the model's own: they are not to be written to.
    """

    def update_tokens(self, layer: int, tokens: Float[Tensor, "image patch dim"]) -> None: ...


@contextmanager
def token_hooks(model: nn.Module, found: Survey, observers: Sequence[TokenObserver]) -> Iterator[None]:
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
    passing = _Passing(found, [path in found.token_first for path in paths], observers)
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

    def __init__(self, found: Survey, token_first: Sequence[bool], observers: Sequence[TokenObserver]) -> None:
        self._found = found
        self._token_first = token_first
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
        return as_sequence(tokens, self._images, self._found, layer, token_first=self._token_first[layer])

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
