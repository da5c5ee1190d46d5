"""Reading checkpoints with timm's parameter names: timm's, this package's, and the originals of DeiT, DINO, MAE and DINOv2."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args

from torch import Tensor

from vit_probe.checkpoints.architectures import (
    fields_from_name,
    is_another_family,
    is_published,
    trained_with_quick_gelu,
)
from vit_probe.checkpoints.checkpoint import Checkpoint
from vit_probe.checkpoints.renaming import rename_parameters
from vit_probe.checkpoints.shapes import NOT_IN_SHAPES, config_from_shapes
from vit_probe.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Interpolation, Preprocessing, as_triple
from vit_probe.errors import AssumptionWarning, InputError, UnsupportedArchitecture
from vit_probe.models.config import ViTConfig, as_pair

__all__ = ["from_state_dict", "matches", "preprocessing_from_config"]

_NAMES = (
    (r"^patch_embed\.backbone\.(conv|norm)\.", r"patch_embed.backbone.stem.\1."),  # a stem without stages
    (r"^register_tokens$", "reg_token"),  # this line and the next two: DINOv2's original files
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),  # DeiT III's original files
)
_MASK_TOKEN = r"(mask_token|masked_embed)$"  # the latter is iBOT's

_POOLING = {"token": "token", "avg": "avg"}
_ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
# Arguments of timm's model that are read here, that shapes determine, or that change nothing in evaluation.
_KNOWN_ARGUMENTS = {
    "num_heads", "act_layer", "img_size", "global_pool",
    "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "mlp_ratio", "qkv_bias", "qk_norm", "proj_bias",
    "init_values", "class_token", "no_embed_class", "reg_tokens", "pre_norm", "final_norm", "fc_norm", "scale_attn_norm",
    "scale_mlp_norm",
    "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "weight_init",
    "fix_init", "dynamic_img_size", "dynamic_img_pad", "strict_img_size",
}  # fmt: skip


def matches(state: Mapping[str, Tensor]) -> bool:
    """Return whether the parameters have timm's names."""
    return "patch_embed.proj.weight" in state


def from_state_dict(
    state: Mapping[str, Tensor], overrides: Mapping[str, Any], config: Mapping[str, Any] | None = None, *, name: str = ""
) -> Checkpoint:
    """Convert a state dict to a `Checkpoint`, using timm's `config.json` if there is one.

    Without `config.json` the preprocessing is unknown. A mask token identifies DINOv2's original files, whose position table
    is interpolated as in transformers' DINOv2: without antialiasing, unless there are registers. DINOv2's original code also
    scales the grid by 0.1 patches more than is needed (`interpolate_offset`), which moves the position embeddings by up to
    6.5 % at 224 pixels; that is not done here.

    Args:
        state: Parameters under timm's names.
        overrides: Fields of `ViTConfig` given by the user. `num_classes=0` leaves out the head and the hidden layer before it.
        config: Content of `config.json` in timm's hub layout: `architecture`, `global_pool`, `model_args`, `pretrained_cfg`.
        name: Without `config`, the architecture's name, or those of the folder and of the file (`FOLDER/FILE`), which may tell
            it.

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
    if _norms_follow_branches(state):
        raise UnsupportedArchitecture(
            "the file lists each block's norm1 after its attention, as it is for models whose layer norms follow the residual "
            "branches, which VisionTransformer does not support; build the model with the code that trained it, and pass it "
            "itself instead of the file"
        )
    clip = "norm_pre.weight" in renamed
    if config is None:
        known |= fields_from_name(name) | dict(overrides)
        # Neither an architecture's name nor a CLIP's parameters say for sure with which GELU it was trained.
        certain = [field for field in NOT_IN_SHAPES if is_published(name) and not (clip and field == "activation")]
        usual = {"activation": "quick_gelu"} if clip and trained_with_quick_gelu(name) else {}
        return Checkpoint(config_from_shapes(renamed, known, usual=usual, certain=certain), renamed, None)
    known |= _fields_from_config(config, renamed) | dict(overrides)
    certain = list(NOT_IN_SHAPES) if is_published(str(config["architecture"])) else []
    checkpoint = Checkpoint(config_from_shapes(renamed, known, certain=certain), renamed, None)
    _check_arguments(config)
    _check_shapes(config, checkpoint.config)
    if clip and "activation" not in known:
        _warn_of_quick_gelu(config)
    preprocessing = preprocessing_from_config(config.get("pretrained_cfg") or config)
    stride = checkpoint.config.patch_stride
    if preprocessing is not None and any(length % patch for length, patch in zip(preprocessing.size, stride, strict=True)):
        size, patches = (f"{height} x {width}" for height, width in (preprocessing.size, stride))
        raise UnsupportedArchitecture(f"its images of {size} pixels do not divide into patches of {patches}")
    return replace(checkpoint, preprocessing=preprocessing)


def _norms_follow_branches(state: Mapping[str, Tensor]) -> bool:
    """Return whether the first block was built with its attention before `norm1`, as PyTorch writes parameters in that order.

    An alphabetical order, as in safetensors files, says nothing.
    """
    names = [name for name in state if name.startswith("blocks.0.")]
    first = next((name.split(".")[2] for name in names if name.split(".")[2] in ("norm1", "attn")), None)
    return first == "attn" and names != sorted(names)


def _warn_of_quick_gelu(config: Mapping[str, Any]) -> None:
    """Warn if timm computes GELU with weights that were trained with QuickGELU."""
    tag = str((config.get("pretrained_cfg") or {}).get("tag"))
    if trained_with_quick_gelu(f"{config['architecture']}.{tag}"):
        warnings.warn(
            f"timm's {config['architecture']} computes GELU, as is done here, but its weights {tag!r} were trained with "
            "QuickGELU (from Python, pass activation='quick_gelu' to load_model, unless they were fine-tuned since)",
            AssumptionWarning,
            stacklevel=3,
        )


def _fields_from_config(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of `ViTConfig` that `config.json` states and shapes do not."""
    architecture = str(config["architecture"])
    if is_another_family(architecture):
        raise UnsupportedArchitecture(f"{architecture} is of another family than ViT")
    known = fields_from_name(architecture)
    arguments = config.get("model_args") or {}
    if arguments.get("num_heads") is not None:
        known["num_heads"] = arguments["num_heads"]
    if arguments.get("act_layer") in _ACTIVATIONS:
        known["activation"] = arguments["act_layer"]
    size, patch = arguments.get("img_size"), state["patch_embed.proj.weight"].shape[2:]
    if isinstance(size, list) and not any(length % side for length, side in zip(size, patch, strict=False)):
        known["image_size"] = tuple(size)  # a position table tells only square ones
    pool = arguments.get("global_pool", config.get("global_pool", "token"))
    if pool not in _POOLING:
        raise UnsupportedArchitecture(
            f"{architecture} pools its tokens by {pool!r}; VisionTransformer supports {', '.join(_POOLING)}"
        )
    if "global_pool" in config and "dist_token" not in state:
        known["pooling"] = _POOLING[pool]
    return known


def _check_arguments(config: Mapping[str, Any]) -> None:
    """Check that the model is built with no arguments whose effect is not known here."""
    arguments = config.get("model_args") or {}
    unknown = sorted(set(arguments) - _KNOWN_ARGUMENTS)
    if (arguments.get("act_layer") or "gelu") not in _ACTIVATIONS:
        unknown.append("act_layer")
    if unknown:
        listed = ", ".join(f"{name}={arguments[name]!r}" for name in unknown)
        raise UnsupportedArchitecture(
            f"{config['architecture']} is built with {listed}, which VisionTransformer does not support"
        )


def _check_shapes(config: Mapping[str, Any], found: ViTConfig) -> None:
    """Check that the model's arguments agree with the shapes of its weights."""
    width, arguments = found.embed_dim, config.get("model_args") or {}
    held: dict[str, Any] = {
        "embed_dim": width, "depth": found.depth, "qkv_bias": found.qkv_bias, "qk_norm": found.qk_norm,
        "reg_tokens": found.num_registers, "class_token": found.class_token, "pre_norm": found.pre_norm,
        "init_values": found.layer_scale is not None,
    }  # fmt: skip
    if not found.stem:  # whose strides timm counts into the size of a patch
        held |= {"patch_size": as_pair(found.patch_size, "patch_size"), "in_chans": found.in_channels}
    if found.activation != "swiglu":  # of which timm counts both hidden layers
        held["mlp_ratio"] = round(found.mlp_ratio * width)
    converted: dict[str, Callable[[Any], Any]] = {
        "init_values": bool,
        "patch_size": lambda size: as_pair(size, "patch_size"),
        "mlp_ratio": lambda ratio: int(ratio * width),
    }
    for name, value in held.items():
        stated = arguments.get(name)
        if stated is not None and converted.get(name, lambda same: same)(stated) != value:
            raise UnsupportedArchitecture(f"config.json has {name}={stated!r}, which contradicts the shapes of the weights")


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
    if mode == "center" and scaled[0] != scaled[1]:
        return None  # timm then resizes until both sides are covered, which is not always by the shorter one
    return Preprocessing(
        size=(height, width),
        resize=scaled if mode == "squash" else max(scaled),
        mean=as_triple(config.get("mean") or IMAGENET_MEAN),
        std=as_triple(config.get("std") or IMAGENET_STD),
        interpolation=interpolation,
    )
