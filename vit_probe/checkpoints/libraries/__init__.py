"""Loading models of other libraries that `VisionTransformer` does not cover, one module per library."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from vit_probe.checkpoints.checkpoint import check_finite, check_preprocessing
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.errors import AssumptionWarning, InputError

__all__ = ["finish_model", "reject_overrides", "resize_without_padding"]


def finish_model(model: nn.Module, preprocessing: Preprocessing | None) -> nn.Module:
    """Check a library's model, attach its `preprocessing` and put it in evaluation mode.

    Raises:
        InputError: If a parameter holds NaN or infinity, or images would be prepared at an absurd size.
    """
    check_preprocessing(preprocessing)
    check_finite(model.named_parameters())
    model.preprocessing = preprocessing  # type: ignore[assignment]
    return model.eval()


def resize_without_padding(size: tuple[int, int], **fields: Any) -> Preprocessing:
    """Return a plain resize for a model whose own preprocessing pads, which `Preprocessing` cannot express, and warn about it.

    Args:
        size: Height and width of the result in pixels.
        fields: Other fields of `Preprocessing`.
    """
    warnings.warn(
        "this model's own preprocessing keeps a photograph's proportions and pads it; here the photograph is resized to "
        f"exactly {size[0]} x {size[1]} pixels instead (from Python, set model.preprocessing, or pass tensors)",
        AssumptionWarning,
        stacklevel=2,
    )
    return Preprocessing(size, size, **fields)


def reject_overrides(overrides: Mapping[str, Any], explanation: str) -> None:
    """Check that no fields of `ViTConfig` were given for a model of another library.

    Args:
        overrides: The fields given by the user.
        explanation: The beginning of the error message: which model it is, and why it is not a `VisionTransformer`.

    Raises:
        InputError: If there are any.
    """
    if overrides:
        raise InputError(
            f"{explanation}; models of other libraries accept no fields of ViTConfig, leave out {', '.join(overrides)}"
        )
