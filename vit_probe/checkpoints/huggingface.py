"""transformers' checkpoints: ViT, MAE, DeiT, DINOv2 and DINOv2 with registers, under their old and new parameter names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vit_probe.checkpoints.checkpoint import Checkpoint
from vit_probe.checkpoints.huggingface_images import preprocessing
from vit_probe.checkpoints.renaming import join, rename
from vit_probe.checkpoints.shapes import config_from_shapes
from vit_probe.errors import UnsupportedArchitecture

__all__ = ["MODEL_TYPES", "from_state", "is_layout"]

MODEL_TYPES = ("vit", "vit_mae", "deit", "dinov2", "dinov2_with_registers")

# Files keep the names of transformers 4 (`encoder.layer.0.attention.attention.query`, `intermediate.dense`); models of
# transformers 5 in memory have others (`layers.0.attention.q_proj`, `mlp.fc1`).
_PREFIX = rf"({'|'.join(sorted(MODEL_TYPES, key=len, reverse=True))})\."
_NAMES = (
    (rf"^{_PREFIX}", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.query."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.key."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.value."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.weights_out|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
    (r"^(cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)
_IGNORED = rf"({_PREFIX})?(embeddings\.mask_token$|pooler\.)|decoder\."
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu"}
_FIELDS = {
    "image_size": "image_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "layer_norm_eps": "norm_eps",
}


def is_layout(state: Mapping[str, Tensor]) -> bool:
    """Whether the parameters have transformers' names."""
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in state)


def from_state(
    state: Mapping[str, Tensor],
    overrides: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Reads a state dict, with `config.json` and `preprocessor_config.json` where they are there.

    Mask tokens, poolers and the decoders of pre-training are left out. With `config` but no `processor`, photographs are
    prepared as the model type's image processor does by default (see `preprocessing`); without either, nothing says how.

    Args:
        state: Parameters under either spelling of transformers' names, with or without the base model's prefix.
        overrides: Fields of `ViTConfig` that the user gave.
        config: What `config.json` holds; its `model_type` one of `MODEL_TYPES`.
        processor: What `preprocessor_config.json` holds.

    Raises:
        UnsupportedArchitecture: If the model has parts that `VisionTransformer` has not, or its shapes do not tell enough.
    """
    renamed = join(rename(state, _NAMES, drop=_IGNORED), ("query", "key", "value"), "qkv")
    renamed = join(renamed, ("gate_proj", "up_proj"), "fc1")
    dinov2 = "blocks.0.ls1.gamma" in renamed
    registers = "reg_token" in renamed
    known: dict[str, Any] = {
        "position_resampling": "bicubic-antialias" if registers else "bicubic",
        "norm_eps": 1e-6 if dinov2 else 1e-12,
        "position_prefix": 1 if registers else None,  # the class token alone has a position
    }
    if "head_dist.weight" not in renamed and "dist_token" in renamed:
        known["pooling"] = "token"
    if config is None:
        return Checkpoint(config_from_shapes(renamed, known | dict(overrides)), renamed, None)
    known |= _known(config)
    checkpoint = config_from_shapes(renamed, known | dict(overrides))
    return Checkpoint(checkpoint, renamed, preprocessing(str(config["model_type"]), checkpoint, processor))


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` says, as fields of `ViTConfig`."""
    known = {field: config[key] for key, field in _FIELDS.items() if config.get(key) is not None}
    if isinstance(known.get("image_size"), list):
        known["image_size"] = tuple(known["image_size"])
    activation = config.get("hidden_act", "gelu")
    if config.get("use_swiglu_ffn"):
        known["activation"] = "swiglu"
    elif activation in _ACTIVATIONS:
        known["activation"] = _ACTIVATIONS[activation]
    else:
        raise UnsupportedArchitecture(
            f"config.json names the activation {activation!r}; VisionTransformer knows {', '.join(_ACTIVATIONS)} and swiglu"
        )
    return known
