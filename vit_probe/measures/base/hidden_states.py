"""What measures of hidden states have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

from jaxtyping import Float
from torch import Tensor

from vit_probe.attention.tiles import AttentionInputs, AttentionTile
from vit_probe.errors import InputError

__all__ = ["HiddenStateMeasure"]


class HiddenStateMeasure(ABC):
    """A streaming measure of the patch tokens after each block; a `vit_probe.tokens.hidden_states.TokenObserver`.

    A batch counts once all its layers have come. Attention is not looked at, so the model's own fused attention runs.

    Args:
        modules: Path of each layer's module, as `AttentionRun.layers` lists them.
    """

    name: str
    display_name: str  # what is measured, for messages
    min_batch_size = 1  # images that a batch must have to count

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = list(modules)
        self._batch: list[Any] = []  # of each layer so far
        self._images = 0  # in the batch
        # The attributes at the start of the batch. Subclasses replace their values and do not change them in place.
        self._before: dict[str, Any] = {}

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What distinguishes this measure from others of its name, for provenance."""

    @abstractmethod
    def _reduced(self, tokens: Float[Tensor, "image patch dim"]) -> Any:
        """What is kept of a layer's tokens until the batch is complete."""

    @abstractmethod
    def _add(self, batch: list[Any], images: int) -> None:
        """Count a complete batch in, given what `_reduced` returned for each layer."""

    def begin_layer(self, inputs: AttentionInputs) -> bool:
        """Whether tiles of attention are needed: no."""
        return False

    def update(self, tile: AttentionTile) -> None:  # noqa: B027  (an observer of attention has this method)
        """Do nothing: no attention is asked for."""

    def update_tokens(self, layer: int, tokens: Float[Tensor, "image patch dim"]) -> None:
        """Take a layer's tokens, the layers in order.

        Raises:
            InputError: If the layer is not the next one, or the tokens are not all finite.
        """
        if layer != len(self._batch) or layer >= len(self.modules):
            raise InputError(
                f"tokens of layer {layer} came after those of {len(self._batch)} layers, and {self.display_name} are of "
                f"{len(self.modules)} layers; show all layers of a batch in order, between begin_batch and end_batch"
            )
        self._batch.append(self._reduced(tokens))
        self._images = len(tokens)

    def begin_batch(self) -> None:
        """Remember the present state for `roll_back`, and forget a batch that was not completed."""
        self._batch = []
        self._before = {name: value for name, value in vars(self).items() if name not in ("_batch", "_before")}

    def end_batch(self) -> None:
        """Count the batch in.

        Raises:
            InputError: If the tokens of some layers have not come.
        """
        batch, self._batch = self._batch, []
        if len(batch) != len(self.modules):
            raise InputError(
                f"{self.display_name} need the tokens of {len(self.modules)} layers, but those of {len(batch)} came; show them "
                "within AttentionRun.observe"
            )
        self._add(batch, self._images)

    def roll_back(self) -> None:
        """Forget everything since `begin_batch`, also where the batch had ended."""
        self._batch = []
        vars(self).update(self._before)

    def _check_alike(self, other: Self) -> None:
        """Raise InputError unless `other` has the same layers and options."""
        if (self.name, self.modules, self.options) != (other.name, other.modules, other.options):
            raise InputError(
                f"cannot merge {self.display_name}: {len(other.modules)} layers with the options {other.options} and "
                f"{len(self.modules)} layers with the options {self.options}; measure the same model in the same way"
            )
