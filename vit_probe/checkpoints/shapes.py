"""Determining a model's configuration from the shapes of its parameters."""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from vit_probe.errors import AssumptionWarning, InputError, UnsupportedArchitecture
from vit_probe.models.config import ResNetConfig, ViTConfig, as_pair

__all__ = ["NOT_IN_SHAPES", "config_from_shapes"]

# Published models of each width: ViT and DeiT, CLIP, SigLIP, DINOv2 and timm's own sizes.
_NUM_HEADS_BY_WIDTH = {
    192: 3, 256: 4, 320: 5, 384: 6, 512: 8, 640: 10, 768: 12, 832: 13, 896: 14,
    1024: 16, 1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16,
}  # fmt: skip
NOT_IN_SHAPES = ("num_heads", "activation", "norm_eps", "pooling")
"""Fields of `ViTConfig` that the shapes of parameters do not determine."""


def config_from_shapes(
    state: Mapping[str, Tensor],
    known: Mapping[str, Any],
    *,
    usual: Mapping[str, Any] | None = None,
    certain: Container[str] = (),
) -> ViTConfig:
    """Determine the configuration of parameters under this package's names.

    What shapes do not determine is taken from `known`, or else is as in most published models: GELU, an epsilon of 1e-6
    (1e-5 if there is CLIP's `norm_pre`), the usual number of heads for the width, and pooling of the class token if there is
    one. A warning says what was assumed in this way. A position table with a square number of patches is assumed to be a
    square grid.

    Args:
        state: Parameters by name.
        known: Fields of `ViTConfig` known from elsewhere; they take precedence over the shapes.
        usual: Fields in which models of this source usually differ from most published models.
        certain: Fields whose usual value is no assumption, because the source has no other.

    Raises:
        UnsupportedArchitecture: If parameters that every `VisionTransformer` has are missing or of another kind, or if the
            number of heads or the grid cannot be determined.
        InputError: If the position table does not fit the image size.

    Examples:
        >>> from vit_probe import ViTConfig, VisionTransformer
        >>> config = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
        >>> config_from_shapes(VisionTransformer(config).state_dict(), {"num_heads": 3}) == config
        True
    """
    projection = _shape(state, "patch_embed.proj.weight", 4)
    width, (_, hidden) = projection[0], _shape(state, "blocks.0.mlp.fc2.weight", 2)
    gated = _shape(state, "blocks.0.mlp.fc1.weight", 2)[0] == 2 * hidden
    stem = _resnet(state)
    config: dict[str, Any] = {
        "patch_size": projection[2:],
        "in_channels": _shape(state, "patch_embed.backbone.stem.conv.weight", 4)[1] if stem else projection[1],
        "embed_dim": width,
        "depth": _count(state, r"blocks\.(\d+)\."),
        "mlp_ratio": hidden / width,
        "num_classes": _shape(state, "head.weight", 2)[0] if "head.weight" in state else 0,
        "class_token": "cls_token" in state,
        "distillation_token": "dist_token" in state,
        "num_registers": _shape(state, "reg_token", 3)[1] if "reg_token" in state else 0,
        "pooling": _pooling(state, width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in state else None,
        "norm_eps": 1e-5 if "norm_pre.weight" in state else 1e-6,
        "activation": "swiglu" if gated else "gelu",
        "patch_bias": "patch_embed.proj.bias" in state,
        "pre_norm": "norm_pre.weight" in state,
        "norm_pooled": "fc_norm.weight" in state,
        "stem": stem,
    }
    config |= dict(usual or {}) | dict(known)
    if "num_heads" not in config:
        config["num_heads"] = _num_heads(state, width, gated=gated)
    stated = {*known, "num_heads"} if config["qk_norm"] else {*known}
    _warn_of_assumptions(config, [field for field in NOT_IN_SHAPES if field not in stated and field not in certain])
    return ViTConfig(**(config | _positions(state, config)))


def _shape(state: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    if name not in state:
        raise UnsupportedArchitecture(f"the checkpoint is incomplete: it holds no parameter {name}")
    shape = tuple(state[name].shape)
    if len(shape) != ndim:
        raise UnsupportedArchitecture(
            f"{name} should have {ndim} axes, but in the checkpoint it has the shape {shape}"
            + (", as in a model of videos" if len(shape) == 5 else "")
        )
    return shape


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return one more than the largest index in the names that match `pattern`; 0 if none does."""
    count = 1 + max((int(match[1]) for name in state if (match := re.match(pattern, name))), default=-1)
    if count > len(state):
        raise UnsupportedArchitecture(f"the parameters are numbered up to {count - 1}, but there are only {len(state)}")
    return count


def _resnet(state: Mapping[str, Tensor]) -> ResNetConfig | None:
    if "patch_embed.backbone.stem.conv.weight" not in state:
        return None
    stages = r"patch_embed\.backbone\.stages\."
    layers = tuple(_count(state, rf"{stages}{stage}\.blocks\.(\d+)\.") for stage in range(_count(state, rf"{stages}(\d+)\.")))
    return ResNetConfig(layers, width=_shape(state, "patch_embed.backbone.stem.conv.weight", 4)[0])


def _pooling(state: Mapping[str, Tensor], width: int) -> str:
    if "head_dist.weight" in state or ("dist_token" in state and "head.weight" not in state):
        return "distilled"
    if "head.weight" in state and _shape(state, "head.weight", 2)[1] == 2 * width:
        return "token+avg"
    # timm's models that average normalise after pooling (`fc_norm`), whether or not they have a class token.
    return "avg" if "cls_token" not in state or "fc_norm.weight" in state else "token"


def _num_heads(state: Mapping[str, Tensor], width: int, *, gated: bool) -> int:
    if "blocks.0.attn.q_norm.weight" in state:
        (head_dim,) = _shape(state, "blocks.0.attn.q_norm.weight", 1)
        if head_dim == width:
            raise UnsupportedArchitecture(
                "queries and keys are normalised over all heads at once, which VisionTransformer does not support (if the "
                "model has a single head, pass num_heads=1 to load_model)"
            )
        return width // head_dim
    if width not in _NUM_HEADS_BY_WIDTH:
        raise UnsupportedArchitecture(
            "the checkpoint does not say how many attention heads a layer has, and no published model has its width of "
            f"{width}; pass num_heads= to load_model (save_model keeps it)"
        )
    # Two published models are 1536 wide: DINOv2's giant, with SwiGLU and 24 heads, and SigLIP's, with GELU and 16.
    return 16 if width == 1536 and not gated else _NUM_HEADS_BY_WIDTH[width]


def _warn_of_assumptions(config: Mapping[str, Any], assumed: list[str]) -> None:
    """Warn that these fields have their usual values, because nothing states them."""
    if not assumed:
        return
    heads = f"how many attention heads a layer has; {config['num_heads']} are assumed, as in published models of width "
    others = [f"{field}={config[field]!r}" for field in assumed if field != "num_heads"]
    if "activation" in assumed:
        others.append("layer norms before the branches")
    if "num_heads" in assumed:
        said = f"{heads}{config['embed_dim']}{', with ' if others else ''}"
    else:
        said = "how its layers compute; assumed are "
    arguments = ", ".join(f"{field}=" for field in assumed)
    warnings.warn(
        f"the checkpoint does not say {said}{', '.join(others)} (if that is wrong: from Python, pass {arguments} to "
        "load_model; save_model keeps them)",
        AssumptionWarning,
        stacklevel=3,
    )


def _positions(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Determine how positions are embedded, and for which image size."""
    height, width = (
        side * (config["stem"].stride if config["stem"] else 1) for side in as_pair(config["patch_size"], "patch_size")
    )
    if config.get("position") in ("none", "relative", "rope_2d"):
        # No table is added to the tokens, so nothing states the image size: the nearest one to 224 is as good as any.
        nearest = max(round(224 / height), 1) * height, max(round(224 / width), 1) * width
        return {"image_size": config.get("image_size", nearest)}
    num_prefix = config["class_token"] + config["distillation_token"] + config["num_registers"]
    if "pos_embed.row" in state:
        rows, cols = (_shape(state, f"pos_embed.{axis}", 3)[1] for axis in ("row", "col"))
        prefix = _shape(state, "pos_embed.prefix", 3)[1]
        return {
            "position": "learned_2d",
            "position_prefix": None if prefix == num_prefix else prefix,
            "image_size": (rows * height, cols * width),
        }
    if "pos_embed" not in state:
        raise UnsupportedArchitecture(
            "the checkpoint holds no position table (pos_embed); if it was saved from a VisionTransformer without one, pass "
            "position='none', 'relative' or 'rope_2d'; other models with rotary or relative positions are not supported"
        )
    length = _shape(state, "pos_embed", 3)[1]
    known_prefix = config.get("position_prefix")
    if config.get("image_size") is not None:
        size = as_pair(config["image_size"], "image_size")
        num_patches = (size[0] // height) * (size[1] // width)
        prefix = length - num_patches
        if not 0 <= prefix <= num_prefix or (known_prefix is not None and prefix != known_prefix):
            raise InputError(
                f"the position table has {length} entries, which does not fit images of {size[0]} x {size[1]} pixels "
                f"({num_patches} patches and up to {num_prefix} prefix tokens); image_size= must be the size that the table "
                "was made for; for another size, load the model without it, then call model.resize(image_size)"
            )
    else:
        # The table may cover no prefix token, the class token, the class and distillation tokens, or all of them.
        class_token = int(config["class_token"])
        candidates = {0, class_token, class_token + config["distillation_token"], num_prefix}
        if known_prefix is not None:
            candidates = {known_prefix}
        grids = [(prefix, isqrt(length - prefix)) for prefix in sorted(candidates) if length > prefix]
        square_grids = [(prefix, side) for prefix, side in grids if side * side == length - prefix]
        if len(square_grids) != 1:
            raise UnsupportedArchitecture(
                f"the grid of patches cannot be determined from a position table of {length} entries with {num_prefix} prefix "
                f"tokens ({'more than one square fits' if square_grids else 'it is not a square'}); "
                "pass image_size=(height, width)"
            )
        prefix, side = square_grids[0]
        size = side * height, side * width
    return {"image_size": size, "position_prefix": None if prefix == num_prefix else prefix}
