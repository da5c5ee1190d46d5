"""Reading torchvision's Vision Transformer checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vit_probe.checkpoints.checkpoint import Checkpoint
from vit_probe.checkpoints.renaming import rename_parameters
from vit_probe.checkpoints.shapes import config_from_shapes
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.errors import InputError
from vit_probe.models.config import as_pair

__all__ = ["from_state_dict", "matches"]

_NAMES = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
)


def matches(state: Mapping[str, Tensor]) -> bool:
    """Return whether the parameters have torchvision's names."""
    return "conv_proj.weight" in state and "encoder.pos_embedding" in state


def from_state_dict(state: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> Checkpoint:
    """Convert a state dict of torchvision to a `Checkpoint`.

    Images are prepared as for torchvision's `IMAGENET1K_V1` weights: the shorter side resized bilinearly to 256/224 of the
    image size, then a centre crop. (The `SWAG` weights, whose files look the same, expect a bicubic resize to the image size
    itself; `torchvision:NAME.WEIGHTS` applies it.)

    Args:
        state: Parameters under torchvision's names.
        overrides: Fields of `ViTConfig` given by the user. `num_classes=0` leaves out the head and the hidden layer before it.

    Raises:
        InputError: If the model has parts that `VisionTransformer` does not have, or its shapes do not determine the
            configuration.
    """
    if overrides.get("num_classes") == 0:
        state = {name: value for name, value in state.items() if not name.startswith("heads.")}
    if any(name.startswith("heads.pre_logits.") for name in state):
        raise InputError(
            "the checkpoint has a hidden layer before the head (heads.pre_logits), which VisionTransformer does not support; "
            "pass num_classes=0 to load the model without its head"
        )
    renamed = rename_parameters(state, _NAMES)
    config = config_from_shapes(renamed, {"position_resampling": "bicubic-align-corners"} | dict(overrides))
    size = as_pair(config.image_size, "image_size")
    return Checkpoint(config, renamed, Preprocessing.imagenet(size, interpolation="bilinear"))
