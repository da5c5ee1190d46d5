"""Our own models in one file: parameters as safetensors, with configuration and preprocessing beside them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vit_probe.atomic_io import write_bytes
from vit_probe.checkpoints.checkpoint import Checkpoint
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.errors import InputError
from vit_probe.models.config import ResNetConfig, ViTConfig, check_fields
from vit_probe.models.patch_embed import HybridEmbed, PatchEmbed
from vit_probe.models.vit import VisionTransformer

__all__ = ["read_own", "save_model"]

_KEY = "vit_probe.model"


def save_model(model: VisionTransformer, path: str | Path) -> Path:
    """Save a model to one `.safetensors` file, with its configuration and preprocessing, for `load_model`.

    Unlike a bare state dict, the file states the number of heads and how images are prepared.

    Args:
        model: Saved in the parameters' own dtype, such as float16.
        path: Must end in `.safetensors`; an existing file is replaced atomically.

    Raises:
        InputError: If the model is of another class, the path does not end in `.safetensors` or cannot be written, or the model
            has a custom stem or encoder, which its configuration does not describe.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from vit_probe import load_model, save_model
        >>> model = load_model("demo")
        >>> with TemporaryDirectory() as folder:
        ...     load_model(save_model(model, f"{folder}/model.safetensors")).config == model.config
        True
    """
    if not isinstance(model, VisionTransformer):
        got = repr(model) if isinstance(model, str | Path) else type(model).__name__
        raise InputError(
            f"save_model takes a VisionTransformer of vit_probe, got {got}; pass load_model(...) of a checkpoint, or save the "
            "models of other libraries with those"
        )
    if model.encoder is not None or not isinstance(model.patch_embed, PatchEmbed | HybridEmbed):
        part = model.patch_embed if model.encoder is None else model.encoder
        raise InputError(
            f"the model cannot be built again from its configuration, which does not describe its {type(part).__name__}; "
            "save its state_dict() instead"
        )
    if Path(path).suffix != ".safetensors":
        raise InputError(f"a model is saved as .safetensors, got the path {path}")
    content = {
        "config": asdict(model.config),
        "preprocessing": asdict(model.preprocessing) if model.preprocessing else None,
    }
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    return write_bytes(path, save(state, metadata={_KEY: json.dumps(content, sort_keys=True)}))


def read_own(path: Path) -> Checkpoint | None:
    """Read a file that `save_model` wrote; None for any other safetensors file.

    Raises:
        InputError: If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                return None
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a complete safetensors file ({error})") from None
    content = json.loads(metadata[_KEY])
    config, preprocessing = _with_tuples(content["config"]), content["preprocessing"]
    check_fields(config)
    if config["stem"] is not None:
        config["stem"] = ResNetConfig(**_with_tuples(config["stem"]))
    return Checkpoint(
        ViTConfig(**config), state, None if preprocessing is None else Preprocessing(**_with_tuples(preprocessing))
    )


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
