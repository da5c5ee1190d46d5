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
from vit_probe.models.vit import VisionTransformer

__all__ = ["read_own", "save_model"]

_KEY = "vit_probe.model"


def save_model(model: VisionTransformer, path: str | Path) -> Path:
    """Writes the model to one safetensors file, from which `load_model` builds it again without being told anything.

    A bare state dict does not say how many heads a layer has, or how photographs are prepared; this file does.

    Args:
        model: Parameters are kept in their type, float16 for one.
        path: Ends with `.safetensors`. An older file is replaced whole or not at all.

    Raises:
        InputError: If the path ends otherwise, or cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise InputError(f"a model is saved as .safetensors, got the path {path}")
    content = {
        "config": asdict(model.config),
        "preprocessing": asdict(model.preprocessing) if model.preprocessing else None,
    }
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    return write_bytes(path, save(state, metadata={_KEY: json.dumps(content, sort_keys=True)}))


def read_own(path: Path) -> Checkpoint | None:
    """What `save_model` wrote; None if the file is another's.

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
        raise InputError(f"{path} is not a whole safetensors file ({error})") from None
    content = json.loads(metadata[_KEY])
    config, preprocessing = _with_tuples(content["config"]), content["preprocessing"]
    check_fields(config)
    if config["stem"] is not None:
        config["stem"] = ResNetConfig(**_with_tuples(config["stem"]))
    return Checkpoint(ViTConfig(**config), state, Preprocessing(**_with_tuples(preprocessing)) if preprocessing else None)


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
