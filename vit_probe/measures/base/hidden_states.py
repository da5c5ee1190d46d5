"""What measures of hidden tokens have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Float
from torch import Tensor

from vit_probe.attention.tiles import AttentionInputs, AttentionTile
from vit_probe.errors import InputError

__all__ = ["HiddenStateMeasure"]


class HiddenStateMeasure(ABC):
    """A streaming measure of the patch tokens that pass from layer to layer; a `vit_probe.tokens.hidden_states.TokenObserver`.

    What it makes of a batch counts once the batch is complete. It looks at no attention, so that the model's own fused
    attention is left to run.

    Args:
        modules: Path of each layer's module, as `AttentionRun.layers` lists them.
    """

    display_name: str  # is measured, for messages
    min_batch_size = 1  # images in a batch, of fewer of which nothing is made

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = list(modules)
        self._batch: list[np.ndarray] = []  # of each layer so far
        self._images = 0  # in the batch
        self._before: dict[str, Any] = {}  # the attributes when the batch began; none of their values is changed in place

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What distinguishes this measure from others of its kind, for provenance."""

    @abstractmethod
    def _reduced(self, tokens: Float[Tensor, "image patch dim"]) -> np.ndarray:
        """What is kept of a layer's tokens until the batch is complete."""

    @abstractmethod
    def _add(self, batch: list[np.ndarray], images: int) -> None:
        """Counts a complete batch in, of which it is given what `_reduced` made of each layer."""

    def begin_layer(self, inputs: AttentionInputs) -> bool:
        """Whether attention is needed: no."""
        return False

    def update(self, tile: AttentionTile) -> None:  # noqa: B027  (an observer of attention has this method)
        """Does nothing: no attention is asked for."""

    def update_tokens(self, layer: int, tokens: Float[Tensor, "image patch dim"]) -> None:
        """Takes a layer's tokens, the layers in order.

        Raises:
            InputError: If the layer is another than the next, or the tokens are not all finite.
        """
        if layer != len(self._batch) or layer >= len(self.modules):
            raise InputError(
                f"tokens of layer {layer} came after those of {len(self._batch)} layers, and {self.display_name} are of "
                f"{len(self.modules)} layers; show all layers of a batch in order, between begin_batch and end_batch"
            )
        self._batch.append(self._reduced(tokens))
        self._images = len(tokens)

    def begin_batch(self) -> None:
        """Marks where `roll_back` goes back to, and forgets what came of a batch that was not completed."""
        self._batch = []
        self._before = {name: value for name, value in vars(self).items() if name not in ("_batch", "_before")}

    def end_batch(self) -> None:
        """Counts the batch in.

        Raises:
            InputError: If tokens of some layers have not come.
        """
        batch, self._batch = self._batch, []
        if len(batch) != len(self.modules):
            raise InputError(
                f"{self.display_name} need the tokens of {len(self.modules)} layers, but those of {len(batch)} came; show them within "
                "AttentionRun.observe"
            )
        self._add(batch, self._images)

    def roll_back(self) -> None:
        """Forgets what came since `begin_batch`, also where the batch had ended."""
        self._batch = []
        vars(self).update(self._before)

    def _check_alike(self, other: Self) -> None:
        """Raise InputError unless `other` has the same layers and options."""
        if (self.modules, self.options) != (other.modules, other.options):
            raise InputError(
                f"cannot merge {self.display_name} of {len(other.modules)} layers with the options {other.options} into those of "
                f"{len(self.modules)} layers with the options {self.options}; measure the same model in the same way"
            )
