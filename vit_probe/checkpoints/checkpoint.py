"""What every source of weights is turned into, and the model that is built from it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vit_probe.data.preprocessing import Preprocessing
from vit_probe.errors import AssumptionWarning, InputError, UnsupportedArchitecture
from vit_probe.models.config import ViTConfig, as_pair
from vit_probe.models.vit import VisionTransformer

__all__ = ["Checkpoint", "check_finite", "usual_preprocessing"]

_LISTED = 20  # names in an error, at most


@dataclass(frozen=True)
class Checkpoint:
    """A configuration, parameters under our own names, and how photographs are prepared.

    Args:
        config: The model's configuration.
        state: Parameters by name.
        preprocessing: None if the source does not say; the usual one for ImageNet is then assumed, with a warning
            (none for images that are not of three channels).
    """

    config: ViTConfig
    state: dict[str, Tensor]
    preprocessing: Preprocessing | None

    def build(self) -> VisionTransformer:
        """The model in evaluation mode.

        Raises:
            UnsupportedArchitecture: If parameters are missing, unexpected or wrongly shaped.
            InputError: If they are not finite.
        """
        config, state = self.config, self.state
        if config.num_classes == 0:
            state = {name: value for name, value in state.items() if not name.startswith("head")}
        with torch.device("meta"):
            model = VisionTransformer(config)
        expected = {name: parameter.shape for name, parameter in model.state_dict().items()}
        problems = [
            ("missing", sorted(set(expected) - set(state))),
            ("unexpected", sorted(set(state) - set(expected))),
            (
                "wrongly shaped",
                [
                    f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
                    for name, shape in expected.items()
                    if name in state and state[name].shape != shape
                ],
            ),
        ]
        found = [f"{kind}: {_listed(names)}" for kind, names in problems if names]
        if found:
            raise UnsupportedArchitecture(f"the checkpoint does not fit the model it describes; {'; '.join(found)}")
        check_finite(state.items())
        model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
        model.preprocessing = self.preprocessing
        if self.preprocessing is None and config.in_channels == 3:
            model.preprocessing = usual_preprocessing(as_pair(config.image_size, "image_size"))
        return model.eval()


def check_finite(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Refuses parameters that are no numbers.

    Raises:
        InputError: If one holds NaN or infinity.
    """
    unusable = [name for name, value in parameters if not value.isfinite().all()]
    if unusable:
        raise InputError(f"the checkpoint holds NaN or infinity (a diverged training?) in {', '.join(unusable[:5])}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def usual_preprocessing(size: tuple[int, int]) -> Preprocessing:
    """What is usual for ImageNet, for a checkpoint that does not say; warns that it is assumed."""
    preprocessing = Preprocessing.usual(size)
    warnings.warn(
        "the checkpoint does not say how photographs are prepared for it; ImageNet's mean and standard deviation are assumed "
        f"and {size[0]} x {size[1]} pixels cut from a shorter side of {preprocessing.resize} "
        "(from Python, set model.preprocessing)",
        AssumptionWarning,
        stacklevel=4,
    )
    return preprocessing
