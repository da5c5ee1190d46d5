"""Reading torchvision's Vision Transformer checkpoints."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vit_probe.checkpoints.checkpoint import Checkpoint
from vit_probe.checkpoints.renaming import rename_parameters
from vit_probe.checkpoints.shapes import config_from_shapes
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.errors import AssumptionWarning, InputError
from vit_probe.models.config import ViTConfig, as_pair

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


_SWAG_SIZES = ((384, 384), (512, 512), (518, 518))  # of torchvision's own weights, only SWAG's are made for them


def matches(state: Mapping[str, Tensor]) -> bool:
    """Return whether the parameters have torchvision's names."""
    return "conv_proj.weight" in state and "encoder.pos_embedding" in state


def from_state_dict(state: Mapping[str, Tensor], overrides: Mapping[str, Any], *, name: str = "") -> Checkpoint:
    """Convert a state dict of torchvision to a `Checkpoint`.

    Torchvision published two kinds of weights. For those of `SWAG`, told by the file's name or by the image size, images are
    resized bicubically to the image size. For `IMAGENET1K_V1`, the shorter side is resized bilinearly to 256/224 of the image
    size (for ViT-L/16, to 242 pixels) before a centre crop; a warning says so if the file has not torchvision's own name.

    Args:
        state: Parameters under torchvision's names.
        overrides: Fields of `ViTConfig` given by the user. `num_classes=0` leaves out the head and the hidden layer before it.
        name: The names of the folder and of the file (`FOLDER/FILE`), which may tell which weights these are.

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
    known = {"position_resampling": "bicubic-align-corners"} | dict(overrides)
    config = config_from_shapes(renamed, known, certain=("activation", "norm_eps", "pooling"))  # torchvision has no others
    return Checkpoint(config, renamed, _preprocessing(config, name))


def _preprocessing(config: ViTConfig, name: str) -> Preprocessing:
    size = as_pair(config.image_size, "image_size")
    if "swag" in name.lower() or size in _SWAG_SIZES:
        return Preprocessing(size, min(size), interpolation="bicubic")
    if not re.search(r"vit_[bl]_\d\d-[0-9a-f]{8}", name):  # not as torchvision names its files
        warnings.warn(
            "the file does not say which of torchvision's weights it holds; photographs are prepared as for IMAGENET1K_V1 "
            "(from Python, set model.preprocessing; torchvision:NAME.WEIGHTS knows each)",
            AssumptionWarning,
            stacklevel=4,
        )
    if (config.embed_dim, config.patch_size, size) == (1024, (16, 16), (224, 224)):
        return Preprocessing(size, 242, interpolation="bilinear")
    return Preprocessing.imagenet(size, interpolation="bilinear")
