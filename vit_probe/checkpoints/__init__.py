"""Loading weights from files, folders and the hub, whichever library wrote them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from vit_probe.checkpoints import google_npz, huggingface, timm, torchvision
from vit_probe.checkpoints.checkpoint import Checkpoint
from vit_probe.checkpoints.files import TENSOR_SUFFIXES, WEIGHT_FILES, read_arrays, read_folder, read_json, read_tensors
from vit_probe.checkpoints.hub import PREFIXES, fetch
from vit_probe.checkpoints.libraries import open_clip as open_clip_models
from vit_probe.checkpoints.libraries import refuse_overrides
from vit_probe.checkpoints.libraries import timm as timm_models
from vit_probe.checkpoints.libraries import torchvision as torchvision_models
from vit_probe.checkpoints.libraries import transformers as transformers_models
from vit_probe.checkpoints.own import read_own, save_model
from vit_probe.errors import InputError, UnsupportedArchitecture
from vit_probe.models.config import check_fields

__all__ = ["Checkpoint", "load_model", "save_model"]

_DEMO = Path(__file__).parent.parent / "demo" / "model.safetensors"
_OTHERS = "demo, hf:ORG/NAME, timm:NAME, torchvision:NAME and open_clip:ARCH/TAG"


def load_model(name_or_path: str | Path, **overrides: Any) -> nn.Module:
    """The model of a checkpoint, in evaluation mode, carrying its `preprocessing` and `name`.

    It is our own `VisionTransformer` wherever that covers the architecture, else the library's own model, for which the
    library must be installed (`pip install 'vit-probe[timm]'`, and so on). `preprocessing` is None where a resize and a
    central crop cannot express how the library prepares photographs.

    Args:
        name_or_path: One of

            - `demo`, the small model that comes with the package (its card: `vit_probe/demo/README.md`);
            - a `.npz` file in Google's layout (vision_transformer, plain or hybrid; big_vision);
            - a `.safetensors` file of `save_model`;
            - a `.safetensors`, `.pt` or `.pth` file with timm's, transformers', torchvision's or our own parameter names
              (read without running pickled code), of a model that `VisionTransformer` covers;
            - a folder with `config.json` and weights, as transformers or timm writes it. Ours are ViT, MAE, DeiT, DINOv2 and
              DINOv2 with registers; others are the library's (CLIP, SigLIP, DINOv3, BEiT, EVA, Swin, SAM; of a model with
              two towers the one for images);
            - `hf:ORG/NAME` or `timm:NAME`, such a folder fetched from the Hugging Face hub unless its cache holds it;
            - `torchvision:NAME` or `torchvision:NAME.WEIGHTS` (`torchvision:vit_b_16.IMAGENET1K_SWAG_E2E_V1`), a classifier
              of torchvision; `vit_` models are ours;
            - `open_clip:ARCH/TAG` (`open_clip:ViT-B-32/laion2b_s34b_b79k`), `open_clip:ARCH/PATH` with a checkpoint's path,
              `open_clip:hf-hub:ORG/NAME` or `open_clip:local-dir:FOLDER`, the image tower of open_clip's model.
        overrides: Fields of `ViTConfig` that go before what the checkpoint says, and help where it does not say enough
            (`num_heads=`, `image_size=`). `num_classes=0` leaves out the head. A library's model takes none, not that either.

    Raises:
        InputError: If there is no such checkpoint, it is damaged or of an unknown kind, it needs code to be run, its
            parameters do not fit (missing, unexpected and wrongly shaped ones are listed), or the library that it needs is
            not installed. A model with random weights is never returned.
    """
    check_fields(overrides)
    name = str(name_or_path)
    source, _, rest = name.partition(":")
    if source == "torchvision":
        model = torchvision_models.load(rest, overrides)
    elif source == "open_clip":
        refuse_overrides(overrides, f"{name} is a model of open_clip's own")
        model = open_clip_models.load(rest)
    elif name.startswith(PREFIXES):
        model = _read_folder(fetch(name), overrides, name)
    elif name_or_path == "demo":  # a Path("demo") is a file or folder of that name
        model = _read_file(_DEMO, overrides).build()
    else:
        path = Path(name).expanduser()
        model, name = _read_path(path, overrides), path.resolve().name
    model.name = name  # type: ignore[assignment]
    return model


def _read_path(path: Path, overrides: Mapping[str, Any]) -> nn.Module:
    if path.is_dir():
        return _read_folder(path, overrides, str(path))
    if not path.is_file():
        raise InputError(f"there is no checkpoint file or folder {path}; others are {_OTHERS}")
    if path.name in WEIGHT_FILES and (path.parent / "config.json").is_file():
        return _read_folder(path.parent, overrides, str(path.parent))
    return _read_file(path, overrides).build()


def _read_file(path: Path, overrides: Mapping[str, Any]) -> Checkpoint:
    if path.suffix == ".npz":
        return google_npz.from_arrays(read_arrays(path), overrides)
    if path.suffix not in TENSOR_SUFFIXES:
        raise InputError(f"{path} is no checkpoint that can be read; known are .npz, {', '.join(TENSOR_SUFFIXES)} and folders")
    if path.suffix == ".safetensors" and (own := read_own(path)) is not None:
        return replace(own, config=replace(own.config, **overrides))
    state = read_tensors(path)
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


def _read_folder(folder: Path, overrides: Mapping[str, Any], shown: str) -> nn.Module:
    """Our own model if it covers the folder's, else that of the library that wrote it; `shown` is its name in errors."""
    if not (folder / "config.json").is_file():
        raise InputError(f"the folder {folder} holds no config.json; it should be as transformers or timm write it")
    config = read_json(folder / "config.json")
    if not isinstance(config.get("architecture", config.get("model_type")), str):
        raise InputError(f"{folder / 'config.json'} names neither a model_type, as transformers does, nor timm's architecture")
    library = "timm" if "architecture" in config else "transformers"
    try:
        with _warnings_of_success():
            return _read_own(folder, config, overrides).build()
    except UnsupportedArchitecture as error:
        why = str(error)
    refuse_overrides(overrides, f"{shown} holds a model of {library}'s own, because for VisionTransformer {why}")
    load_folder = timm_models.load_folder if library == "timm" else transformers_models.load_folder
    try:
        return load_folder(folder, config)
    except InputError as error:
        raise InputError(f"{shown} can be read neither as VisionTransformer ({why}) nor by {library} ({error})") from None


def _read_own(folder: Path, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Checkpoint:
    if "architecture" in config:
        return timm.from_state(read_folder(folder), overrides, config)
    if config["model_type"] not in huggingface.MODEL_TYPES:
        raise UnsupportedArchitecture(
            f"its type is {config['model_type']!r}; supported are {', '.join(huggingface.MODEL_TYPES)}"
        )
    processor = folder / "preprocessor_config.json"
    return huggingface.from_state(read_folder(folder), overrides, config, read_json(processor) if processor.is_file() else None)


@contextmanager
def _warnings_of_success() -> Iterator[None]:
    """Holds warnings back, and drops them if the block raises: what was assumed for a model that is not built matters not."""
    with warnings.catch_warnings(record=True) as held:
        warnings.simplefilter("always")
        yield
    for warning in held:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
