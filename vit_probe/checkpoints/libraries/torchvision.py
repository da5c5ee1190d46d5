"""Loading torchvision's models with its published weights: its Vision Transformers as `VisionTransformer`, others unchanged."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from vit_probe.checkpoints.import_library import import_library, one_line, suggest_similar
from vit_probe.checkpoints.libraries import finish_model, reject_overrides
from vit_probe.checkpoints.torchvision import from_state_dict, matches
from vit_probe.data.preprocessing import Interpolation, Preprocessing, as_triple
from vit_probe.errors import InputError

__all__ = ["load"]


def load(name: str, overrides: Mapping[str, Any]) -> nn.Module:
    """Load a model with pretrained weights, and with the preprocessing that these were published with.

    Args:
        name: `NAME` for torchvision's default weights, or `NAME.WEIGHTS`, such as `vit_b_16.IMAGENET1K_SWAG_E2E_V1`.
        overrides: Fields of `ViTConfig`; accepted for `vit_` models only.

    Raises:
        InputError: If torchvision is not installed or has no such model or weights, if these cannot be downloaded, or if
            `overrides` are given for another model.
    """
    models = import_library("torchvision", f"torchvision:{name}").models
    model_name, _, weights_name = name.partition(".")
    names = models.list_models(module=models)
    if model_name not in names:
        raise InputError(f"torchvision has no classification model {model_name!r}{suggest_similar(model_name, names)}")
    published = models.get_model_weights(model_name)
    if weights_name and weights_name not in published.__members__:
        listed = ", ".join(published.__members__)
        raise InputError(f"torchvision has no weights {weights_name!r} of {model_name}; it has {listed}")
    if not model_name.startswith("vit_"):
        reject_overrides(overrides, f"torchvision:{name} is loaded by torchvision")
    weights = published[weights_name or "DEFAULT"]
    state = _fetch(weights)
    preprocessing = _preprocessing(weights.transforms())
    if matches(state):
        with torch.device("meta"):  # without memory for its parameters: only the number of heads is read off it
            num_heads = models.get_model(model_name, weights=None).encoder.layers[0].num_heads
        checkpoint = from_state_dict(state, {"num_heads": num_heads} | dict(overrides), name=weights.url)
        return replace(checkpoint, preprocessing=preprocessing).build()
    try:
        # torchvision sets what else its weights need (their number of classes, for example). It reads the file that was just
        # found to be safe.
        model = models.get_model(model_name, weights=weights)
    except RuntimeError as error:
        raise InputError(f"the weights {weights} do not fit {model_name}: {one_line(error)}") from None
    return finish_model(model, preprocessing)


def _fetch(weights: Any) -> dict[str, Tensor]:
    """Return the parameters, from torch.hub's cache or from the network, without running pickled code."""
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True, map_location="cpu")
    except Exception as error:  # no network, a server's error, a wrong hash, a damaged file
        raise InputError(
            f"{weights} can be neither downloaded nor read from {torch.hub.get_dir()}/checkpoints "
            f"({type(error).__name__}: {one_line(error)}); check the network, or delete the file there if it is damaged"
        ) from None


def _preprocessing(transform: Any) -> Preprocessing | None:
    """Convert torchvision's `ImageClassification` preset; None for an interpolation that `Preprocessing` does not have."""
    if transform.interpolation.value not in get_args(Interpolation):
        return None
    (size,), (resize,) = transform.crop_size, transform.resize_size
    return Preprocessing(
        (size, size), resize, as_triple(transform.mean), as_triple(transform.std), transform.interpolation.value
    )
