"""Checks of what users pass to a run."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import nn

from vit_probe.attention.arguments import check_model
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.errors import InputError
from vit_probe.tokens.grid import check_grid

__all__ = ["check_model_and_images", "check_run_options", "select_device"]


def check_model_and_images(model: object, images: object) -> None:
    """Raise InputError unless `model` is a model with weights, and `images` is none."""
    check_model(model, images)
    if isinstance(images, nn.Module):
        raise InputError(f"the images are a model, {type(images).__name__}; pass photographs, paths or a tensor")


def check_run_options(grid: object, preprocessing: object, batch_size: object) -> None:
    """Raise InputError unless each option is of its type."""
    check_grid(grid)
    if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
        raise InputError(
            f"preprocessing must be a Preprocessing, such as Preprocessing.imagenet((224, 224)), or None; got {preprocessing!r}"
        )
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
        raise InputError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")


def select_device(name: str | torch.device) -> torch.device:
    """The device called `name`; `auto` is CUDA, else MPS, else the CPU.

    Raises:
        InputError: If there is no such device here, or it holds no numbers, as the meta device.

    Examples:
        >>> select_device("cpu")
        device(type='cpu')
    """
    if not isinstance(name, str | torch.device):
        raise InputError(f"device must be a name such as auto, cpu, cuda or mps, got {name!r}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except Exception as error:  # each backend that is missing has its own way to say so
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise InputError(f"device {str(name)!r} is not available ({reason}); choose auto, cpu, cuda or mps") from None
    return device
