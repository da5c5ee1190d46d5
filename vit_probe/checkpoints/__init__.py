"""Loading weights from files, folders and the hub, whichever library wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vit_probe.checkpoints import google_npz, huggingface, timm, torchvision
from vit_probe.checkpoints.checkpoint import Checkpoint
from vit_probe.checkpoints.files import TENSOR_SUFFIXES, WEIGHT_FILES, read_arrays, read_folder, read_json, read_tensors
from vit_probe.checkpoints.hub import PREFIXES, fetch
from vit_probe.checkpoints.own import read_own, save_model
from vit_probe.config import check_fields
from vit_probe.errors import InputError
from vit_probe.vit import VisionTransformer

__all__ = ["Checkpoint", "load_model", "save_model"]

_DEMO = Path(__file__).parent.parent / "demo" / "model.safetensors"


def load_model(name_or_path: str | Path, **overrides: Any) -> VisionTransformer:
    """The model of a checkpoint, in evaluation mode, carrying its `preprocessing` and `name`.

    Args:
        name_or_path: One of

            - `demo`, the small model that comes with the package (its card: `vit_probe/demo/README.md`);
            - a `.npz` file in Google's layout (vision_transformer, plain or hybrid; big_vision);
            - a `.safetensors` file of `save_model`;
            - a `.safetensors`, `.pt` or `.pth` file with timm's, transformers', torchvision's or our own parameter names
              (read without running pickled code);
            - a folder with `config.json` and weights, as transformers (ViT, DeiT, DINOv2, DINOv2 with registers) or timm
              writes it;
            - `hf:ORG/NAME` or `timm:NAME`, fetched from the Hugging Face hub unless its cache holds it.
        overrides: Fields of `ViTConfig` that go before what the checkpoint says, and help where it does not say enough
            (`num_heads=`, `image_size=`). `num_classes=0` leaves out the head.

    Raises:
        InputError: If there is no such checkpoint, it is damaged or of an unknown kind, it needs code to be run, or its
            parameters do not fit (missing, unexpected and wrongly shaped ones are listed).
    """
    check_fields(overrides)
    name = str(name_or_path)
    if name.startswith(PREFIXES):
        model = _read_folder(fetch(name), overrides).build()
        model.name = name
        return model
    bundled = name_or_path == "demo"  # a Path("demo") is a file or folder of that name
    path = _DEMO if bundled else Path(name).expanduser()
    model = _read_path(path, overrides).build()
    model.name = name if bundled else path.resolve().name
    return model


def _read_path(path: Path, overrides: Mapping[str, Any]) -> Checkpoint:
    if path.is_dir():
        return _read_folder(path, overrides)
    if not path.is_file():
        raise InputError(f"there is no checkpoint file or folder {path}; others are demo, hf:ORG/NAME and timm:NAME")
    if path.suffix == ".npz":
        return google_npz.from_arrays(read_arrays(path), overrides)
    if path.suffix not in TENSOR_SUFFIXES:
        raise InputError(f"{path} is no checkpoint that can be read; known are .npz, {', '.join(TENSOR_SUFFIXES)} and folders")
    if path.name in WEIGHT_FILES and (path.parent / "config.json").is_file():
        return _read_folder(path.parent, overrides)
    if path.suffix == ".safetensors" and (own := read_own(path)) is not None:
        return replace(own, config=replace(own.config, **overrides))
    return _read_state(read_tensors(path), path, overrides)


def _read_folder(folder: Path, overrides: Mapping[str, Any]) -> Checkpoint:
    if not (folder / "config.json").is_file():
        raise InputError(f"the folder {folder} holds no config.json; it should be as transformers or timm write it")
    config = read_json(folder / "config.json")
    if "architecture" in config:
        return timm.from_state(read_folder(folder), overrides, config)
    if config.get("model_type") not in huggingface.MODEL_TYPES:
        raise InputError(
            f"{folder / 'config.json'} is of a model of type {config.get('model_type')!r}; supported are "
            f"{', '.join(huggingface.MODEL_TYPES)}, and timm's models"
        )
    processor = folder / "preprocessor_config.json"
    return huggingface.from_state(read_folder(folder), overrides, config, read_json(processor) if processor.is_file() else None)


def _read_state(state: Mapping[str, Tensor], path: Path, overrides: Mapping[str, Any]) -> Checkpoint:
    if huggingface.is_layout(state):
        return huggingface.from_state(state, overrides)
    if torchvision.is_layout(state):
        return torchvision.from_state(state, overrides)
    if timm.is_layout(state):
        return timm.from_state(state, overrides)
    raise InputError(
        f"{path} is no Vision Transformer of a known layout (timm's or our own, transformers', torchvision's); its first "
        f"parameters are {', '.join(list(state)[:3])}"
    )
