"""Loading pretrained models from files, folders and the Hugging Face hub, whichever library wrote them."""

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
from vit_probe.checkpoints.files import (
    WEIGHT_FILES,
    expand_home,
    file_format,
    read_arrays,
    read_content,
    read_folder,
    read_json,
)
from vit_probe.checkpoints.hub import PREFIXES, fetch
from vit_probe.checkpoints.import_library import one_line
from vit_probe.checkpoints.libraries import open_clip as open_clip_models
from vit_probe.checkpoints.libraries import reject_overrides
from vit_probe.checkpoints.libraries import timm as timm_models
from vit_probe.checkpoints.libraries import torchvision as torchvision_models
from vit_probe.checkpoints.libraries import transformers as transformers_models
from vit_probe.checkpoints.names import suggest_source
from vit_probe.checkpoints.own import read_own, save_model
from vit_probe.checkpoints.sizes import check_depth
from vit_probe.checkpoints.state_dicts import find_state, stated_architecture
from vit_probe.data.image_files import printable
from vit_probe.errors import InputError, UnsupportedArchitecture
from vit_probe.models.config import check_fields

__all__ = ["Checkpoint", "load_model", "save_model"]

_DEMO = Path(__file__).parent.parent / "demo" / "model.safetensors"
_MAX_NAME = 200  # characters of a name in an error message
_NAMES = "demo, hf:ORG/NAME, timm:NAME, torchvision:NAME or open_clip:ARCH/TAG"


def load_model(name_or_path: str | Path, **overrides: Any) -> nn.Module:
    """Load a pretrained model in evaluation mode.

    The model is a `VisionTransformer` of this package wherever that covers the architecture. Otherwise it is the model of the
    library that wrote the checkpoint, which must then be installed (for example `pip install 'vit-probe[timm]'`).

    Args:
        name_or_path: One of

            - `demo`: the small model bundled with the package (described in `vit_probe/demo/README.md`);
            - a `.npz` file in Google's layout (vision_transformer, plain or hybrid; big_vision);
            - a `.safetensors` file written by `save_model`;
            - a file of safetensors or of `torch.save` (`.pt`, `.pth`, `.bin`, `.ckpt`, ...) with the parameter names of timm,
              transformers, torchvision or this package, of an architecture that `VisionTransformer` covers. It may be a
              checkpoint as training leaves it: what precedes the parameters' names is stripped, heads, decoders and optimisers
              beside the model are left out, and of several models in one file, the teacher, target or moving average is taken,
              with a warning. What shapes do not tell (heads, activation, epsilon, pooling) is taken from the architecture's
              name, as the checkpoint itself, its file or its folder gives it, if it is one of timm's, and else assumed, with a
              warning. Pickled code is never run;
            - a folder with `config.json` and weights, as transformers or timm writes it. ViT, MAE, DeiT, DINOv2 and DINOv2
              with registers become `VisionTransformer`; others are loaded by the library (CLIP, SigLIP, DINOv3, BEiT, EVA,
              Swin, SAM, Depth Anything; of a model that takes text as well, the image tower);
            - `hf:ORG/NAME` or `timm:NAME`: such a folder on the Hugging Face hub, downloaded unless it is cached;
            - `torchvision:NAME` or `torchvision:NAME.WEIGHTS` (`torchvision:vit_b_16.IMAGENET1K_SWAG_E2E_V1`): a classifier
              of torchvision; its `vit_` models become `VisionTransformer`;
            - `open_clip:ARCH/TAG` (`open_clip:ViT-B-32/laion2b_s34b_b79k`), `open_clip:ARCH/PATH` with the path of a
              checkpoint, `open_clip:hf-hub:ORG/NAME` or `open_clip:local-dir:FOLDER`: the image tower of the open_clip model.
        **overrides: Fields of `ViTConfig`. They take precedence over the checkpoint, and supply what it does not state
            (`num_heads=`, `image_size=`). `num_classes=0` leaves out the head. Models of other libraries accept none.

    Returns:
        The model. Its `name` says where it came from. Its `preprocessing` is the `Preprocessing` that the weights expect, or
        None if the library prepares images in a way that a resize and a centre crop cannot express.

    Raises:
        InputError: If the checkpoint does not exist, is damaged, has an unknown format or can only be read by running code
            that it contains; if its parameters do not fit the model (the message lists missing, unexpected and wrongly shaped
            ones); or if a required library is not installed. No parameter is ever left at a random value.

    Examples:
        >>> from vit_probe import load_model
        >>> model = load_model("demo")
        >>> model.config.depth, model.config.num_heads, model.preprocessing.size
        (9, 6, (64, 64))
        >>> load_model("demo", num_classes=0).head
        Identity()
    """
    if not isinstance(name_or_path, str | Path):
        raise InputError(
            f"load_model takes a path or one of {_NAMES}; got {type(name_or_path).__name__} (a model in memory needs no "
            "loading)"
        )
    if name_or_path == "":
        raise InputError(f"the model's name is empty; pass a path, or one of {_NAMES}")
    check_fields(overrides)
    with _input_errors(printable(name_or_path)):
        return _load(name_or_path, overrides)


@contextmanager
def _input_errors(name: str) -> Iterator[None]:
    """Turn whatever the content of a checkpoint makes its readers raise into an InputError.

    Wrong types, sizes and nesting in metadata and configurations surface as nearly any exception, wherever they are used first.
    """
    try:
        yield
    except InputError as error:
        message = printable(str(error))  # names of files and parameters may hold anything
        if message == str(error):
            raise
        raise type(error)(message) from None
    except OSError as error:
        raise InputError(f"{name[:_MAX_NAME]} cannot be read ({error.strerror or type(error).__name__})") from error
    except Exception as error:
        raise InputError(
            f"{name[:_MAX_NAME]} cannot be loaded; it may be damaged, or its parts contradict each other "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error


def _load(name_or_path: str | Path, overrides: Mapping[str, Any]) -> nn.Module:
    name = str(name_or_path)
    source, _, rest = name.partition(":")
    if source == "torchvision":
        model = torchvision_models.load(rest, overrides)
    elif source == "open_clip":
        reject_overrides(overrides, f"{name} is loaded by open_clip")
        model = open_clip_models.load(rest)
    elif name.startswith(PREFIXES):
        model = _load_folder(fetch(name), overrides, display_name=name)
    elif name_or_path == "demo":  # not Path("demo"), which is a file or folder of that name
        model = _read_file(_DEMO, overrides).build()
    else:
        path = expand_home(name)
        model, name = _load_path(path, overrides), printable(path.resolve().name)
    model.name = name  # type: ignore[assignment]
    return model


def _load_path(path: Path, overrides: Mapping[str, Any]) -> nn.Module:
    if path.is_dir():
        return _load_folder(path, overrides, display_name=str(path))
    if not path.exists():
        meant = suggest_source(str(path))
        advice = f"did you mean {meant}?" if meant else f"pass an existing path, or one of {_NAMES}"
        raise InputError(f"there is no checkpoint file or folder {path}; {advice}")
    if path.name in WEIGHT_FILES and (path.parent / "config.json").is_file():
        # The configuration beside the weights states what their shapes do not, such as the preprocessing.
        return _load_folder(path.parent, overrides, display_name=str(path.parent))
    return _read_file(path, overrides).build()


def _read_file(path: Path, overrides: Mapping[str, Any]) -> Checkpoint:
    kind = file_format(path)
    if kind == "npz":
        return google_npz.from_arrays(read_arrays(path), overrides)
    if kind == "safetensors" and (own := read_own(path)) is not None:
        return replace(own, config=replace(own.config, **overrides))
    content = read_content(path)
    state = find_state(content, path)
    name = stated_architecture(content, state) or f"{path.absolute().parent.name}/{path.name}"
    for layout in (huggingface, torchvision, timm):
        if layout.matches(state):
            return layout.from_state_dict(state, overrides, name=name)
    raise InputError(
        f"{path} is not a Vision Transformer with the parameter names of timm, transformers, torchvision or this package; its "
        f"first parameters are {', '.join(list(state)[:3])}"
    )


def _load_folder(folder: Path, overrides: Mapping[str, Any], *, display_name: str) -> nn.Module:
    """Load a folder as `VisionTransformer` if that covers the model, else with the library that wrote the folder."""
    if not (folder / "config.json").is_file():
        raise InputError(f"the folder {folder} holds no config.json; pass a folder that transformers or timm wrote")
    config = read_json(folder / "config.json")
    if not isinstance(config.get("architecture", config.get("model_type")), str):
        raise InputError(f"{folder / 'config.json'} has neither a model_type, as transformers writes, nor timm's architecture")
    if config.get("quantization_config"):
        raise InputError(
            f"the weights of {display_name} are quantised (config.json has a quantization_config); load the original weights, "
            "or load the folder in transformers, call the model's dequantize(), and pass the model itself"
        )
    library = "timm" if "architecture" in config else "transformers"
    try:
        with _warnings_on_success():
            return _read_folder(folder, config, overrides).build()
    except UnsupportedArchitecture as error:
        unsupported = str(error)
    reject_overrides(
        overrides, f"{display_name} is loaded by {library}, because VisionTransformer does not cover it ({unsupported})"
    )
    check_depth(config, len(read_folder(folder)))
    load_folder = timm_models.load_folder if library == "timm" else transformers_models.load_folder
    try:
        return load_folder(folder, config)
    except InputError as error:
        raise InputError(
            f"{display_name} can be loaded neither as VisionTransformer ({unsupported}) nor with {library} ({error})"
        ) from None


def _read_folder(folder: Path, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Checkpoint:
    if "architecture" in config:
        return timm.from_state_dict(find_state(read_folder(folder), folder), overrides, config)
    if config["model_type"] not in huggingface.MODEL_TYPES:
        raise UnsupportedArchitecture(
            f"its model_type is {config['model_type']!r}; supported are {', '.join(huggingface.MODEL_TYPES)}"
        )
    file = folder / "preprocessor_config.json"
    processor = read_json(file) if file.is_file() else None
    return huggingface.from_state_dict(find_state(read_folder(folder), folder), overrides, config, processor)


@contextmanager
def _warnings_on_success() -> Iterator[None]:
    """Hold warnings back until the block ends, and drop them if it raises.

    What was assumed about a `VisionTransformer` does not matter if the library's own model is loaded instead.
    """
    with warnings.catch_warnings(record=True) as held:
        warnings.simplefilter("always")
        yield
    for warning in held:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
