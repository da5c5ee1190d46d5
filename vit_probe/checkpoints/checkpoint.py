"""The common form into which every source's weights are converted, and the model built from it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vit_probe.data.preprocessing import Preprocessing
from vit_probe.errors import AssumptionWarning, InputError, UnsupportedArchitecture
from vit_probe.models.config import ViTConfig, as_pair
from vit_probe.models.vit import VisionTransformer

__all__ = ["MAX_SIDE", "Checkpoint", "assume_imagenet_preprocessing", "check_finite", "check_preprocessing"]

MAX_SIDE = 16_384  # pixels; no published model comes near, and a larger image would fill the memory
_MAX_LISTED = 20  # parameter names in an error message
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """A configuration, parameters under this package's names, and how images are prepared.

    Args:
        config: The model's configuration.
        state: Parameters by name.
        preprocessing: None if the source does not say. The usual preprocessing for ImageNet is then assumed, with a warning
            (none is assumed for images that do not have three channels).

    Examples:
        >>> from vit_probe import Preprocessing, ViTConfig, VisionTransformer
        >>> config = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
        >>> state = VisionTransformer(config).state_dict()
        >>> Checkpoint(config, state, Preprocessing(size=(32, 32), resize=36)).build().training
        False
    """

    config: ViTConfig
    state: dict[str, Tensor]
    preprocessing: Preprocessing | None

    def build(self) -> VisionTransformer:
        """Build the model, in evaluation mode and float32.

        Raises:
            UnsupportedArchitecture: If parameters are missing, unexpected or wrongly shaped.
            InputError: If parameters are not ordinary floating-point numbers, or not finite in float32, or if images would be
                prepared at an absurd size.
        """
        config, state = self.config, self.state
        units = config.depth + (sum(config.stem.layers) if config.stem else 0)
        if units > len(state):  # before modules are built for all of them
            raise UnsupportedArchitecture(f"{units} layers are configured, but the checkpoint holds {len(state)} parameters")
        if config.num_classes == 0:
            state = {name: value for name, value in state.items() if not name.startswith("head")}
        with torch.device("meta"):  # its own initial values are never needed, so none are drawn
            model = VisionTransformer(config)
        expected = {name: parameter.shape for name, parameter in model.state_dict().items()}
        missing = sorted(set(expected) - set(state))
        unexpected = sorted(set(state) - set(expected))
        wrong_shape = [
            f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
            for name, shape in expected.items()
            if name in state and state[name].shape != shape
        ]
        problems = (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", wrong_shape))
        if any(names for _, names in problems):
            listed = "; ".join(f"{problem}: {_listed(names)}" for problem, names in problems if names)
            raise UnsupportedArchitecture(f"the checkpoint does not fit the model it describes; {listed}")
        _check_floating_point(state)
        state = {name: value.float() for name, value in state.items()}
        check_finite(state.items())  # after the cast, in which large float64 numbers become infinite
        check_preprocessing(self.preprocessing)
        model.load_state_dict(state, assign=True)
        model.preprocessing = self.preprocessing
        if self.preprocessing is None and config.in_channels == 3:
            model.preprocessing = assume_imagenet_preprocessing(as_pair(config.image_size, "image_size"))
        return model.eval()


def _check_floating_point(state: Mapping[str, Tensor]) -> None:
    """Check that the parameters are plain floating-point numbers, which need no more than a cast to become float32.

    Integers and 8-bit floats are quantised numbers, whose scales are stored elsewhere: a cast would change the model silently.

    Raises:
        InputError: If some are not.
    """
    kinds = {name: str(value.dtype) if value.dtype not in _DTYPES else value.device.type for name, value in state.items()}
    kinds |= {name: str(value.layout) for name, value in state.items() if value.layout is not torch.strided}
    others = [f"{name} ({kind.removeprefix('torch.')})" for name, kind in kinds.items() if kind != "cpu"]
    if others:
        raise InputError(
            f"parameters must be dense floating-point numbers of 16 to 64 bits, but the checkpoint holds {_listed(others)}; "
            "dequantise the model, or save the weights that it was converted from"
        )


def check_finite(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Check that no parameter holds NaN or infinity.

    Raises:
        InputError: If one does.
    """
    not_finite = [name for name, value in parameters if not value.isfinite().all()]
    if not_finite:
        raise InputError(
            "the checkpoint holds NaN or infinity (did training diverge?), or numbers too large for float32, in "
            f"{', '.join(not_finite[:5])}"
        )


def check_preprocessing(preprocessing: Preprocessing | None) -> None:
    """Check that no image is prepared at a size that only a damaged or hostile configuration states.

    Raises:
        InputError: If a side is longer than 16,384 pixels.
    """
    if preprocessing is not None:
        sides = (*preprocessing.size, *as_pair(preprocessing.resize, "resize"))
        if max(sides) > MAX_SIDE:
            raise InputError(
                f"the checkpoint asks for photographs of {max(sides)} pixels a side; at most {MAX_SIDE} are supported"
            )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more


def assume_imagenet_preprocessing(size: tuple[int, int]) -> Preprocessing:
    """Return the usual preprocessing for ImageNet and warn that it is assumed, for a checkpoint that states none."""
    preprocessing = Preprocessing.imagenet(size)
    warnings.warn(
        "the checkpoint does not say how photographs are prepared for it; ImageNet's mean and standard deviation are assumed, "
        f"after resizing the shorter side to {preprocessing.resize} pixels and cutting {size[0]} x {size[1]} from the centre "
        "(from Python, set model.preprocessing)",
        AssumptionWarning,
        stacklevel=4,
    )
    return preprocessing
