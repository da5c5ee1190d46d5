"""Look inside Vision Transformers: where heads look, what their filters and positions are, what their tokens hold."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vit_probe.measures.base.discovery import measure_files

if TYPE_CHECKING:
    from vit_probe import measures as measures
    from vit_probe import plots as plots
    from vit_probe.attention.hooks import attention_hooks as attention_hooks
    from vit_probe.attention.tiles import AttentionTile as AttentionTile
    from vit_probe.checkpoints import load_model as load_model
    from vit_probe.checkpoints import save_model as save_model
    from vit_probe.data.preprocessing import Preprocessing as Preprocessing
    from vit_probe.data.preprocessing import sample_photographs as sample_photographs
    from vit_probe.errors import InputError as InputError
    from vit_probe.measures.attention_distance import mean_attention_distance as mean_attention_distance
    from vit_probe.measures.attention_entropy import attention_entropy as attention_entropy
    from vit_probe.measures.base.head_measure import head_measure as head_measure
    from vit_probe.measures.base.loading import load_result as load_result
    from vit_probe.measures.base.offset_measure import offset_measure as offset_measure
    from vit_probe.measures.base.per_layer import layer_measure as layer_measure
    from vit_probe.measures.base.reduce import PatchAttention as PatchAttention
    from vit_probe.measures.base.registry import measure as measure
    from vit_probe.measures.class_attention import class_attention as class_attention
    from vit_probe.measures.overview import overview as overview
    from vit_probe.measures.patch_filters import patch_filters as patch_filters
    from vit_probe.measures.position_similarity import position_similarity as position_similarity
    from vit_probe.measures.representation_similarity import representation_similarity as representation_similarity
    from vit_probe.measures.rollout import attention_rollout as attention_rollout
    from vit_probe.measures.token_norms import token_norms as token_norms
    from vit_probe.models.config import ViTConfig as ViTConfig
    from vit_probe.models.position_embedding import resize_position_embedding as resize_position_embedding
    from vit_probe.models.reinitialize import random_weights as random_weights
    from vit_probe.models.vit import VisionTransformer as VisionTransformer
    from vit_probe.results import Result as Result
    from vit_probe.tokens.grid import TokenGrid as TokenGrid
    from vit_probe.tokens.locate import locate_tokens as locate_tokens


_MODULES = {
    "AttentionTile": "attention.tiles",
    "InputError": "errors",
    "PatchAttention": "measures.base.reduce",
    "Preprocessing": "data.preprocessing",
    "Result": "results",
    "TokenGrid": "tokens.grid",
    "ViTConfig": "models.config",
    "VisionTransformer": "models.vit",
    "attention_hooks": "attention.hooks",
    "head_measure": "measures.base.head_measure",
    "layer_measure": "measures.base.per_layer",
    "load_model": "checkpoints",
    "load_result": "measures.base.loading",
    "locate_tokens": "tokens.locate",
    "measure": "measures.base.registry",
    "offset_measure": "measures.base.offset_measure",
    "overview": "measures.overview",
    "random_weights": "models.reinitialize",
    "resize_position_embedding": "models.position_embedding",
    "sample_photographs": "data.preprocessing",
    "save_model": "checkpoints",
} | {one.function: f"measures.{one.name}" for one in measure_files().values()}

__all__ = ["measures", "plots", *_MODULES]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that the command line answers before torch is loaded."""
    if name in ("measures", "plots"):
        return import_module(f"vit_probe.{name}")
    if name in _MODULES:
        return getattr(import_module(f"vit_probe.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'vit_probe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
