"""Reading transformers' checkpoints of ViT, MAE, DeiT, DINOv2 and DINOv2 with registers, under old and new parameter names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vit_probe.checkpoints.architectures import fields_from_name
from vit_probe.checkpoints.checkpoint import Checkpoint
from vit_probe.checkpoints.image_processors import preprocessing_from_processor
from vit_probe.checkpoints.renaming import concatenate_parameters, rename_parameters
from vit_probe.checkpoints.shapes import config_from_shapes
from vit_probe.errors import UnsupportedArchitecture

__all__ = ["MODEL_TYPES", "from_state_dict", "matches"]

MODEL_TYPES = ("vit", "vit_mae", "deit", "dinov2", "dinov2_with_registers")

# Files keep the names of transformers 4 (`encoder.layer.0.attention.attention.query`, `intermediate.dense`), but in memory the
# models of transformers 5 have new ones (`layers.0.attention.q_proj`, `mlp.fc1`).
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
_ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}  # fmt: skip
_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "in_channels",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "qkv_bias": "qkv_bias",
    "mlp_ratio": "mlp_ratio",
    "num_register_tokens": "num_registers",
    "layer_norm_eps": "norm_eps",
}


def matches(state: Mapping[str, Tensor]) -> bool:
    """Return whether the parameters have transformers' names."""
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in state)


def from_state_dict(
    state: Mapping[str, Tensor],
    overrides: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
    *,
    name: str = "",
) -> Checkpoint:
    """Convert a state dict to a `Checkpoint`, using `config.json` and `preprocessor_config.json` if they are there.

    Mask tokens, poolers and the decoders of pre-training are left out. With `config` but no `processor`, the preprocessing is
    the usual one of the model type (see `preprocessing_from_processor`); without either it is unknown.

    Args:
        state: Parameters under transformers' old or new names, with or without the base model's prefix.
        overrides: Fields of `ViTConfig` given by the user.
        config: Content of `config.json`; its `model_type` must be one of `MODEL_TYPES`.
        processor: Content of `preprocessor_config.json`.
        name: Without `config`, the names of the folder and of the file (`FOLDER/FILE`), which may tell the activation.

    Raises:
        UnsupportedArchitecture: If the model has parts that `VisionTransformer` does not have, or its shapes do not determine
            the configuration.
    """
    renamed = rename_parameters(state, _NAMES, drop=_IGNORED)
    renamed = concatenate_parameters(renamed, ("query", "key", "value"), "qkv")
    renamed = concatenate_parameters(renamed, ("gate_proj", "up_proj"), "fc1")
    dinov2 = "blocks.0.ls1.gamma" in renamed
    registers = "reg_token" in renamed
    known: dict[str, Any] = {
        "position_resampling": "bicubic-antialias" if registers else "bicubic",
        "position_prefix": 1 if registers else None,  # the class token alone has a position
    }
    if "head_dist.weight" not in renamed and "dist_token" in renamed:
        known["pooling"] = "token"
    if config is None:
        known |= fields_from_name(name) | dict(overrides)
        usual = {"norm_eps": 1e-6 if dinov2 else 1e-12}
        return Checkpoint(config_from_shapes(renamed, known, usual=usual, certain=("pooling",)), renamed, None)
    known |= _fields_from_config(config) | dict(overrides)
    vit_config = config_from_shapes(renamed, known, certain=("pooling",))
    preprocessing = preprocessing_from_processor(str(config["model_type"]), vit_config, processor)
    return Checkpoint(vit_config, renamed, preprocessing)


def _fields_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert `config.json` to fields of `ViTConfig`, with transformers' own values for what it leaves out.

    Fields that the shapes tell as well are converted too, so that a configuration that contradicts its weights is noticed.
    """
    known: dict[str, Any] = {"num_heads": 12, "norm_eps": 1e-6 if "dinov2" in config["model_type"] else 1e-12}
    known |= {field: config[key] for key, field in _FIELDS.items() if config.get(key) is not None}
    known |= {field: tuple(value) for field, value in known.items() if isinstance(value, list)}
    if config.get("use_swiglu_ffn"):
        known.pop("mlp_ratio", None)  # transformers rounds the hidden width
        return known | {"activation": "swiglu"}
    if "intermediate_size" in config and "embed_dim" in known:
        known["mlp_ratio"] = config["intermediate_size"] / known["embed_dim"]
    activation = config.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise UnsupportedArchitecture(
            f"config.json names the activation {activation!r}; VisionTransformer supports {', '.join(_ACTIVATIONS)}"
        )
    return known | {"activation": _ACTIVATIONS[activation]}
