"""Look inside Vision Transformers: where heads look, what their filters and positions are, what their tokens hold."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_probe.attention.hooks import attention_hooks
    from vit_probe.attention.tiles import AttentionTile
    from vit_probe.checkpoints import load_model, save_model
    from vit_probe.data.preprocessing import Preprocessing, sample_photographs
    from vit_probe.errors import InputError
    from vit_probe.measures.attention_distance import mean_attention_distance
    from vit_probe.measures.attention_entropy import attention_entropy
    from vit_probe.measures.class_attention import class_attention
    from vit_probe.measures.patch_filters import patch_filters
    from vit_probe.measures.position_similarity import position_similarity
    from vit_probe.measures.representation_similarity import representation_similarity
    from vit_probe.measures.rollout import attention_rollout
    from vit_probe.measures.token_norms import token_norms
    from vit_probe.models.config import ViTConfig
    from vit_probe.models.position_embedding import resize_position_embedding
    from vit_probe.models.vit import VisionTransformer
    from vit_probe.results import load_result
    from vit_probe.tokens.grid import TokenGrid

__all__ = [
    "AttentionTile",
    "InputError",
    "Preprocessing",
    "TokenGrid",
    "ViTConfig",
    "VisionTransformer",
    "attention_entropy",
    "attention_hooks",
    "attention_rollout",
    "class_attention",
    "load_model",
    "load_result",
    "mean_attention_distance",
    "patch_filters",
    "position_similarity",
    "representation_similarity",
    "resize_position_embedding",
    "sample_photographs",
    "save_model",
    "token_norms",
]

_MODULES = {
    "checkpoints": ("load_model", "save_model"),
    "models.config": ("ViTConfig",),
    "errors": ("InputError",),
    "tokens.grid": ("TokenGrid",),
    "attention.hooks": ("attention_hooks",),
    "data.preprocessing": ("Preprocessing", "sample_photographs"),
    "measures": (
        "attention_entropy",
        "attention_rollout",
        "class_attention",
        "mean_attention_distance",
        "patch_filters",
        "position_similarity",
        "representation_similarity",
        "token_norms",
    ),
    "models.position_embedding": ("resize_position_embedding",),
    "results": ("load_result",),
    "attention.tiles": ("AttentionTile",),
    "models.vit": ("VisionTransformer",),
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that the command line answers before torch is loaded."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"vit_probe.{module}"), name)
    raise AttributeError(f"module 'vit_probe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
