"""torchvision's models with its published weights: its Vision Transformers as our own, others as they are."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from vit_probe.checkpoints import torchvision as reader
from vit_probe.checkpoints.libraries import adopt, import_library, reason, refuse_overrides, similar
from vit_probe.data.preprocessing import Interpolation, Preprocessing, as_triple
from vit_probe.errors import InputError

__all__ = ["load"]


def load(name: str, overrides: Mapping[str, Any]) -> nn.Module:
    """The model with pretrained weights, and with the preprocessing that these were published with.

    Args:
        name: `NAME` for torchvision's default weights, or `NAME.WEIGHTS`: `vit_b_16.IMAGENET1K_SWAG_E2E_V1` for one.
        overrides: Fields of `ViTConfig`, for a `vit_` model only.

    Raises:
        InputError: If torchvision is not installed or has no such model or weights, they cannot be fetched, or `overrides`
            are given for another model.
    """
    models = import_library("torchvision", f"torchvision:{name}").models
    model_name, _, weights_name = name.partition(".")
    names = models.list_models(module=models)
    if model_name not in names:
        raise InputError(f"torchvision has no classification model {model_name!r}{similar(model_name, names)}")
    known = models.get_model_weights(model_name)
    if weights_name and weights_name not in known.__members__:
        raise InputError(f"torchvision has no weights {weights_name!r} of {model_name}; it has {', '.join(known.__members__)}")
    if not model_name.startswith("vit_"):
        refuse_overrides(overrides, f"torchvision:{name} is a model of torchvision's own")
    weights = known[weights_name or "DEFAULT"]
    state = _fetch(weights)
    preprocessing = _preprocessing(weights.transforms())
    if reader.is_layout(state):
        with torch.device("meta"):
            heads = models.get_model(model_name, weights=None).encoder.layers[0].num_heads
        return replace(reader.from_state(state, {"num_heads": heads} | dict(overrides)), preprocessing=preprocessing).build()
    try:
        # torchvision knows what else goes with its weights; it takes them from the file that was just found to be safe.
        model = models.get_model(model_name, weights=weights)
    except RuntimeError as error:
        raise InputError(f"the weights {weights} do not fit {model_name}: {reason(error)}") from None
    return adopt(model, preprocessing)


def _fetch(weights: Any) -> dict[str, Tensor]:
    """The parameters, from torch.hub's cache or from the network, read without running pickled code."""
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True, map_location="cpu")
    except Exception as error:  # no network, a refusal, a wrong hash, a damaged file
        raise InputError(
            f"{weights} can be neither fetched nor read from {torch.hub.get_dir()}/checkpoints "
            f"({type(error).__name__}: {reason(error)}); check the network, or delete the file there if it is damaged"
        ) from None


def _preprocessing(transform: Any) -> Preprocessing | None:
    """What torchvision's `ImageClassification` preset does."""
    if transform.interpolation.value not in get_args(Interpolation):
        return None
    (size,), (resize,) = transform.crop_size, transform.resize_size
    return Preprocessing(
        (size, size), resize, as_triple(transform.mean), as_triple(transform.std), transform.interpolation.value
    )
