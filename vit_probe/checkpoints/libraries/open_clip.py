"""open_clip's image towers, with the weights that it lists, or with a checkpoint of yours."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from torch import nn

from vit_probe.checkpoints.hub import OPEN_CLIP_FILES, fetch
from vit_probe.checkpoints.libraries import adopt, exact_resize, import_library, reason, similar
from vit_probe.data.preprocessing import Interpolation, Preprocessing, as_triple
from vit_probe.errors import InputError
from vit_probe.models.config import as_pair

__all__ = ["load"]

_HUB, _FOLDER = "hf-hub:", "local-dir:"


def load(name: str) -> nn.Module:
    """The image tower, with the preprocessing that its weights were published with.

    Weights that were trained with OpenAI's approximation of GELU (`quickgelu`) get it, whichever of the two names of the
    architecture is given.

    Args:
        name: `ARCH/TAG` with a tag of `open_clip.list_pretrained()` or the path of a checkpoint file; `hf-hub:ORG/NAME`; or
            `local-dir:FOLDER`, a folder with `open_clip_config.json` and weights.

    Raises:
        InputError: If open_clip is not installed, has no such architecture or weights, or these cannot be fetched or do not
            fit.
    """
    open_clip = import_library("open_clip", f"open_clip:{name}")
    if name.startswith((_HUB, _FOLDER)):
        folder = _folder(name)
        arguments: dict[str, Any] = {"model_name": f"{_FOLDER}{folder}"}
    else:
        arguments = _named(open_clip, name)
    try:
        model = open_clip.create_model(require_pretrained=True, weights_only=True, **arguments)
    except Exception as error:  # no network, or whatever a file's content makes open_clip or torch raise
        raise InputError(f"open_clip cannot load {name} ({reason(error)})") from None
    return adopt(model.visual, _preprocessing(model.visual.preprocess_cfg))


def _folder(name: str) -> Path:
    if name.startswith(_HUB):
        folder = fetch(f"hf:{name.removeprefix(_HUB)}", OPEN_CLIP_FILES)
    else:
        folder = Path(name.removeprefix(_FOLDER)).expanduser()
    if not (folder / "open_clip_config.json").is_file():
        raise InputError(f"open_clip:{name} holds no open_clip_config.json; is it open_clip's?")
    return folder


def _named(open_clip: Any, name: str) -> dict[str, Any]:
    """What `create_model` is given for `ARCH/TAG`."""
    architecture, _, tag = name.partition("/")
    names = open_clip.list_models()
    if architecture not in names:
        raise InputError(f"open_clip has no architecture {architecture!r}{similar(architecture, names)}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    published = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    path = Path(tag).expanduser()
    if not published and not (tag and path.is_file()):
        wrong = f"has no weights {tag!r} for {architecture}" if tag else "needs to be told which weights to take"
        listed = f"write open_clip:{architecture}/TAG with one of {', '.join(tags)}" if tags else "it lists none"
        raise InputError(f"open_clip {wrong}; {listed}; or open_clip:{architecture}/PATH with the path of a checkpoint file")
    quick = bool(published.get("quick_gelu"))
    return {"model_name": architecture, "pretrained": tag if published else str(path), "force_quick_gelu": quick}


def _preprocessing(config: dict[str, Any]) -> Preprocessing | None:
    """What `preprocess_cfg` says; None for images that are not square, unless they are resized to exactly that size."""
    size = as_pair(config["size"], "size")
    interpolation = "bicubic" if config["interpolation"] == "random" else config["interpolation"]
    others: dict[str, Any] = {
        "mean": as_triple(config["mean"]),
        "std": as_triple(config["std"]),
        "interpolation": interpolation,
    }
    if interpolation not in get_args(Interpolation):
        return None
    if config["resize_mode"] == "squash":
        return Preprocessing(size, size, **others)
    if config["resize_mode"] == "longest":
        return exact_resize(size, **others)
    return Preprocessing(size, size[0], **others) if size[0] == size[1] else None
