"""transformers' own models, from folders in its layout."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from vit_probe.checkpoints.checkpoint import usual_preprocessing
from vit_probe.checkpoints.files import read_json
from vit_probe.checkpoints.huggingface_images import from_settings
from vit_probe.checkpoints.libraries import adopt, broken, exact_resize, import_library, reason, similar
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.errors import AssumptionWarning, InputError

__all__ = ["load_folder"]

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def load_folder(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    """transformers' model with the folder's weights in float32, and with its image processor's preprocessing.

    It is the model without a head. Of a model with two towers (CLIP, SigLIP) or with a decoder (SAM), it is the part that
    sees the image.

    Args:
        folder: What `save_pretrained` writes: `config.json`, weights and the image processor's configuration.
        config: What `config.json` holds.

    Raises:
        InputError: If transformers is not installed, does not know the model's type or would have to run the folder's code;
            if it is no model of images; or if the weights do not fit it.
    """
    kind = str(config["model_type"])
    transformers = import_library("transformers", f"a model of type {kind!r}")
    with _quiet(transformers):
        described, model_class = _find_class(transformers, folder, kind)
        return adopt(_build(model_class, folder), _preprocessing(transformers, folder, described))


def _find_class(transformers: Any, folder: Path, kind: str) -> tuple[Any, Any]:
    """The configuration of the part that sees the image, and its class."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        close = similar(kind, transformers.CONFIG_MAPPING.keys())
        raise InputError(
            f"transformers {transformers.__version__} has no model of type {kind!r} ({reason(error)}){close}"
        ) from None
    vision = getattr(config, "vision_config", None)
    try:
        if vision is not None and type(vision) in transformers.MODEL_MAPPING:
            config = vision
        found = transformers.MODEL_MAPPING.get(type(config), None)
    except ImportError as error:  # of the module that holds the class
        raise InputError(broken("transformers", f"a model of type {kind!r}", error)) from None
    model_class = found[0] if isinstance(found, tuple) else found
    if getattr(model_class, "main_input_name", None) != "pixel_values":
        raise InputError(f"a model of type {kind!r} does not take images")
    return config, model_class


def _build(model_class: Any, folder: Path) -> nn.Module:
    model, left = _from_pretrained(model_class, folder)
    if left["missing_keys"] and all(name.startswith("pooler.") for name in left["missing_keys"]):
        # Weights from pre-training have no pooler, and attention does not need one.
        model, left = _from_pretrained(model_class, folder, add_pooling_layer=False)
    # Heads, decoders and other towers are rightly left over; what stands inside the model's own parts is not.
    own = tuple(f"{name}." for name, part in model.named_children() if any(True for _ in part.parameters()))
    own += (f"{model_class.base_model_prefix}.",)
    unexpected = [name for name in left["unexpected_keys"] if name.startswith(own) and not name.endswith("mask_token")]
    problems = [
        f"{what}: {', '.join(sorted(map(str, names))[:10])}"
        for what, names in (
            ("missing", left["missing_keys"]), ("unexpected", unexpected), ("wrongly shaped", left["mismatched_keys"])
        )
        if names
    ]  # fmt: skip
    if problems:
        raise InputError(f"it does not fit {model_class.__name__}; {'; '.join(problems)}")
    return model


def _from_pretrained(model_class: Any, folder: Path, **arguments: Any) -> tuple[nn.Module, dict[str, Any]]:
    try:
        return model_class.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True, **arguments
        )
    except Exception as error:  # whatever a file's content makes transformers, safetensors or torch raise
        raise InputError(f"it does not load as {model_class.__name__}: {reason(error)}") from None


def _preprocessing(transformers: Any, folder: Path, config: Any) -> Preprocessing | None:
    """What the image processor does, if a resize and a central crop can express it, else None.

    Processors have ways of their own, whatever their configuration says: the translation of the configuration is
    therefore tried on an image, and given up if the result differs. Where the processor fills up the frame around the
    photograph (SAM), an exact resize is taken instead, with a warning; where there is no processor, the usual one for
    ImageNet.
    """
    files = [folder / name for name in _PROCESSORS if (folder / name).is_file()]
    if not files:
        size = getattr(config, "image_size", None)
        size = (size, size) if isinstance(size, int) else size
        return usual_preprocessing((int(size[0]), int(size[1]))) if isinstance(size, (tuple, list)) else None
    written = [read_json(file) for file in files]
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        image = _test_image()
        theirs = torch.as_tensor(np.asarray(processor(image, return_tensors="pt")["pixel_values"]))
    except Exception as error:  # a torchvision that does not import, a class that is not known, code that would have to be run
        return _at_its_word(written[0].get("image_processor", written[0]), error)
    if theirs.ndim != 4 or theirs.shape[:2] != (1, 3):
        return None
    settings = processor.to_dict()
    height, width = theirs.shape[2:]
    if settings.get("do_pad") or "longest_edge" in (settings.get("size") or ()):
        ours = _translated(settings | {"size": {"height": height, "width": width}, "do_center_crop": False})
        return ours and exact_resize(ours.size, mean=ours.mean, std=ours.std, interpolation=ours.interpolation)
    ours = _translated(settings)
    if ours is None or ours.size != (height, width):
        return None
    levels = (ours(image)[None] - theirs).abs() * torch.tensor(ours.std)[:, None, None] * 255
    return ours if levels.mean() < 2 else None


def _translated(settings: Mapping[str, Any]) -> Preprocessing | None:
    try:
        return from_settings(settings)
    except (InputError, KeyError, TypeError, ValueError):
        return None


def _at_its_word(settings: Mapping[str, Any], error: Exception) -> Preprocessing | None:
    """The settings of a processor that cannot be tried."""
    ours = _translated(settings)
    if ours is not None:
        warnings.warn(
            f"this model's image processor cannot be run here ({reason(error)}); photographs are prepared as its "
            "configuration reads",
            AssumptionWarning,
            stacklevel=2,
        )
    return ours


def _test_image() -> Image.Image:
    """Ramps, another in each channel, wider than high: any other part, order or scale of it is another image."""
    rows, cols = np.mgrid[:60, :90]
    return Image.fromarray(np.stack([rows * 4, cols * 2, 250 - 2 * rows - cols], axis=-1).astype(np.uint8))


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and load reports: what they say is said here."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
