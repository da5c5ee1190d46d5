"""Loading open_clip's image towers, with weights that it lists or from a checkpoint of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from torch import nn

from vit_probe.checkpoints.files import expand_home
from vit_probe.checkpoints.hub import OPEN_CLIP_FILES, fetch
from vit_probe.checkpoints.import_library import import_library, one_line, suggest_similar
from vit_probe.checkpoints.libraries import finish_model, resize_without_padding
from vit_probe.data.preprocessing import Interpolation, Preprocessing, as_triple
from vit_probe.errors import InputError
from vit_probe.models.config import as_pair

__all__ = ["load"]

_HUB, _FOLDER = "hf-hub:", "local-dir:"


def load(name: str) -> nn.Module:
    """Load the image tower, with the preprocessing that its weights were published with.

    Weights that were trained with OpenAI's approximation of GELU (`quickgelu`) get it, whichever of the architecture's two
    names is given.

    Args:
        name: `ARCH/TAG` with a tag of `open_clip.list_pretrained()` or the path of a checkpoint file; `hf-hub:ORG/NAME`; or
            `local-dir:FOLDER`, a folder with `open_clip_config.json` and weights.

    Raises:
        InputError: If open_clip is not installed or has no such architecture or weights, or if the weights cannot be
            downloaded or do not fit.
    """
    open_clip = import_library("open_clip", f"open_clip:{name}")
    if name.startswith((_HUB, _FOLDER)):
        arguments: dict[str, Any] = {"model_name": f"{_FOLDER}{_find_folder(name)}"}
    else:
        arguments = _arguments(open_clip, name)
    try:
        model = open_clip.create_model(require_pretrained=True, weights_only=True, **arguments)
    except Exception as error:  # no network, or whatever a file's content makes open_clip or torch raise
        raise InputError(f"open_clip cannot load {name} ({one_line(error)})") from None
    return finish_model(model.visual, _preprocessing(model.visual.preprocess_cfg))


def _find_folder(name: str) -> Path:
    if name.startswith(_HUB):
        folder = fetch(f"hf:{name.removeprefix(_HUB)}", OPEN_CLIP_FILES)
    else:
        folder = expand_home(name.removeprefix(_FOLDER))
    if not (folder / "open_clip_config.json").is_file():
        raise InputError(f"open_clip:{name} holds no open_clip_config.json; pass a model in open_clip's format")
    return folder


def _arguments(open_clip: Any, name: str) -> dict[str, Any]:
    """Return the arguments of `create_model` for `ARCH/TAG` or `ARCH/PATH`."""
    architecture, _, tag = name.partition("/")
    names = open_clip.list_models()
    if architecture not in names:
        raise InputError(f"open_clip has no architecture {architecture!r}{suggest_similar(architecture, names)}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    published = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    path = expand_home(tag)
    if not published and not (tag and path.is_file()):
        problem = f"open_clip has no weights {tag!r} for {architecture}" if tag else f"open_clip:{name} names no weights"
        listed = f"write open_clip:{architecture}/TAG with one of {', '.join(tags)}" if tags else "it lists none"
        raise InputError(f"{problem}; {listed}; or open_clip:{architecture}/PATH with the path of a checkpoint file")
    quick_gelu = bool(published.get("quick_gelu"))  # given the wrong one of two names, open_clip only warns
    return {"model_name": architecture, "pretrained": tag if published else str(path), "force_quick_gelu": quick_gelu}


def _preprocessing(config: dict[str, Any]) -> Preprocessing | None:
    """Convert open_clip's `preprocess_cfg`; None for a crop that is not square, which `Preprocessing` cannot express."""
    size = as_pair(config["size"], "size")
    interpolation = "bicubic" if config["interpolation"] == "random" else config["interpolation"]
    fields: dict[str, Any] = {
        "mean": as_triple(config["mean"]),
        "std": as_triple(config["std"]),
        "interpolation": interpolation,
    }
    if interpolation not in get_args(Interpolation):
        return None
    if config["resize_mode"] == "squash":
        return Preprocessing(size, size, **fields)
    if config["resize_mode"] == "longest":
        return resize_without_padding(size, **fields)
    return Preprocessing(size, size[0], **fields) if size[0] == size[1] else None
