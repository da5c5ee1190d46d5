"""Reading checkpoints with timm's parameter names: timm's, this package's, and the originals of DeiT, DINO, MAE and DINOv2."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from torch import Tensor

from vit_probe.checkpoints.checkpoint import Checkpoint
from vit_probe.checkpoints.renaming import rename_parameters
from vit_probe.checkpoints.shapes import config_from_shapes
from vit_probe.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Interpolation, Preprocessing, as_triple
from vit_probe.errors import InputError, UnsupportedArchitecture

__all__ = ["from_state_dict", "matches", "preprocessing_from_config"]

_NAMES = (
    (r"^patch_embed\.backbone\.(conv|norm)\.", r"patch_embed.backbone.stem.\1."),  # a stem without stages
    (r"^register_tokens$", "reg_token"),  # this line and the next two: DINOv2's original files
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
_MASK_TOKEN = r"mask_token$"

# Fields that follow from an architecture's name but not from its parameters.
_FIELDS_BY_ARCHITECTURE: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"clip", {"norm_eps": 1e-5}),
    (r"quickgelu", {"activation": "quick_gelu"}),
    (r"^vit_base_patch16_gap_", {"num_heads": 16}),
    (r"^test_vit2?$", {"num_heads": 2}),
)
# Architectures whose parameters would fit, but which compute something else with them.
_UNSUPPORTED = (
    (r"_rpn_", "layer norms after the residual branches"),
    (r"giantopt|so400m_patch16_siglip|large_patch16_siglip(_gap)?_512|patch32_siglip", "the tanh approximation of GELU"),
)
_POOLING = {"token": "token", "avg": "avg"}


def matches(state: Mapping[str, Tensor]) -> bool:
    """Return whether the parameters have timm's names."""
    return "patch_embed.proj.weight" in state


def from_state_dict(
    state: Mapping[str, Tensor], overrides: Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Convert a state dict to a `Checkpoint`, using timm's `config.json` if there is one.

    Without `config.json` the preprocessing is unknown. A mask token identifies DINOv2's original files, whose position table
    is interpolated as in DINOv2: without antialiasing, unless there are registers.

    Args:
        state: Parameters under timm's names.
        overrides: Fields of `ViTConfig` given by the user. `num_classes=0` leaves out the head and the hidden layer before it.
        config: Content of `config.json` in timm's hub layout: `architecture`, `global_pool`, `pretrained_cfg`.

    Raises:
        UnsupportedArchitecture: If the model has parts that `VisionTransformer` does not have, or its shapes do not determine
            the configuration.
        InputError: If there is a hidden layer before the head.
    """
    known: dict[str, Any] = {}
    if "mask_token" in state and "register_tokens" not in state:
        known["position_resampling"] = "bicubic"
    renamed = rename_parameters(state, _NAMES, drop=_MASK_TOKEN)
    if overrides.get("num_classes") == 0:
        renamed = {name: value for name, value in renamed.items() if not name.startswith("pre_logits.")}
    if any(name.startswith("pre_logits.") for name in renamed):
        raise InputError(
            "the checkpoint has a hidden layer before the head (pre_logits), which VisionTransformer does not support; "
            "pass num_classes=0 to load the model without its head"
        )
    if config is not None:
        known |= _fields_from_config(config, renamed)
    checkpoint = Checkpoint(config_from_shapes(renamed, known | dict(overrides)), renamed, None)
    if config is None:
        return checkpoint
    preprocessing = preprocessing_from_config(config.get("pretrained_cfg") or config)
    stride = checkpoint.config.patch_stride
    if preprocessing is not None and any(length % patch for length, patch in zip(preprocessing.size, stride, strict=True)):
        size, patches = (f"{height} x {width}" for height, width in (preprocessing.size, stride))
        raise UnsupportedArchitecture(f"its images of {size} pixels do not divide into patches of {patches}")
    return replace(checkpoint, preprocessing=preprocessing)


def _fields_from_config(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of `ViTConfig` that `config.json` states and shapes do not."""
    architecture = str(config["architecture"]).partition(".")[0]
    for pattern, feature in _UNSUPPORTED:
        if re.search(pattern, architecture):
            raise UnsupportedArchitecture(f"{architecture} has {feature}, which VisionTransformer does not support")
    known: dict[str, Any] = {}
    for pattern, fields in _FIELDS_BY_ARCHITECTURE:
        if re.search(pattern, architecture):
            known |= fields
    arguments = config.get("model_args") or {}
    if "num_heads" in arguments:
        known["num_heads"] = arguments["num_heads"]
    if arguments.get("act_layer") in ("gelu", "quick_gelu"):
        known["activation"] = arguments["act_layer"]
    pool = config.get("global_pool", "token")
    if pool not in _POOLING:
        raise UnsupportedArchitecture(
            f"{architecture} pools its tokens by {pool!r}; VisionTransformer supports {', '.join(_POOLING)}"
        )
    if "global_pool" in config and "dist_token" not in state:
        known["pooling"] = _POOLING[pool]
    return known


def preprocessing_from_config(config: Mapping[str, Any]) -> Preprocessing | None:
    """Convert timm's `pretrained_cfg`, with timm's defaults; None if a resize and a centre crop cannot express it.

    Examples:
        >>> preprocessing_from_config({"input_size": [3, 224, 224], "crop_pct": 0.9}).resize
        248
    """
    channels, height, width = config.get("input_size") or (3, 224, 224)
    interpolation: Interpolation = config.get("interpolation") or "bicubic"
    mode = config.get("crop_mode") or "center"
    if channels != 3 or interpolation not in get_args(Interpolation) or mode not in ("center", "squash"):
        return None
    crop_ratio = config.get("crop_pct") or 0.875
    scaled = math.floor(height / crop_ratio), math.floor(width / crop_ratio)
    return Preprocessing(
        size=(height, width),
        resize=scaled if mode == "squash" else max(scaled),
        mean=as_triple(config.get("mean") or IMAGENET_MEAN),
        std=as_triple(config.get("std") or IMAGENET_STD),
        interpolation=interpolation,
    )
