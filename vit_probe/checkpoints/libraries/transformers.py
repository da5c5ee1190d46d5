"""Loading transformers' own models, from folders in its layout."""

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

from vit_probe.checkpoints.checkpoint import assume_imagenet_preprocessing
from vit_probe.checkpoints.files import read_json
from vit_probe.checkpoints.image_processors import preprocessing_from_settings
from vit_probe.checkpoints.import_library import import_error, import_library, one_line, suggest_similar
from vit_probe.checkpoints.libraries import finish_model, resize_without_padding
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.errors import AssumptionWarning, InputError

__all__ = ["load_folder"]

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load_folder(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    """Load transformers' model with the folder's weights in float32, and with its image processor's preprocessing.

    The model has no head. If the checkpoint has two towers (CLIP, SigLIP) or a decoder (SAM), the model is its image encoder.

    Args:
        folder: A folder written by `save_pretrained`: `config.json`, weights and the image processor's configuration.
        config: Content of `config.json`.

    Raises:
        InputError: If transformers is not installed, does not have the model's type or would have to run the folder's code;
            if the model does not take images; or if the weights do not fit it.
    """
    model_type = str(config["model_type"])
    transformers = import_library("transformers", f"a model of type {model_type!r}")
    with _quiet(transformers):
        image_config, model_class = _find_class(transformers, folder, model_type)
        return finish_model(_build(model_class, folder), _preprocessing(transformers, folder, image_config))


def _find_class(transformers: Any, folder: Path, model_type: str) -> tuple[Any, Any]:
    """Return the configuration of the part that takes images, and its class."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        similar = suggest_similar(model_type, transformers.CONFIG_MAPPING.keys())
        raise InputError(
            f"transformers {transformers.__version__} has no model of type {model_type!r} ({one_line(error)}){similar}"
        ) from None
    vision_config = getattr(config, "vision_config", None)
    try:
        if vision_config is not None and type(vision_config) in transformers.MODEL_MAPPING:
            config = vision_config
        classes = transformers.MODEL_MAPPING.get(type(config), None)
    except ImportError as error:  # transformers imports the class's module only now
        raise import_error("transformers", f"a model of type {model_type!r}", error) from None
    model_class = classes[0] if isinstance(classes, tuple) else classes
    if getattr(model_class, "main_input_name", None) != "pixel_values":
        raise InputError(f"a model of type {model_type!r} does not take images")
    return config, model_class


def _build(model_class: Any, folder: Path) -> nn.Module:
    model, report = _from_pretrained(model_class, folder)
    if report["missing_keys"] and all(name.startswith("pooler.") for name in report["missing_keys"]):
        # Pre-trained weights often have no pooler. transformers would initialise one at random; attention does not need it.
        model, report = _from_pretrained(model_class, folder, add_pooling_layer=False)
    # Unexpected parameters of heads, decoders and other towers are fine; those inside the model's own modules are not.
    own_prefixes = tuple(f"{name}." for name, module in model.named_children() if any(True for _ in module.parameters()))
    own_prefixes += (f"{model_class.base_model_prefix}.",)
    unexpected = [
        name for name in report["unexpected_keys"] if name.startswith(own_prefixes) and not name.endswith("mask_token")
    ]
    problems = (
        ("missing", report["missing_keys"]), ("unexpected", unexpected), ("wrongly shaped", report["mismatched_keys"])
    )  # fmt: skip
    listed = [f"{problem}: {', '.join(sorted(map(str, names))[:10])}" for problem, names in problems if names]
    if listed:
        raise InputError(f"the weights do not fit {model_class.__name__}; {'; '.join(listed)}")
    return model


def _from_pretrained(model_class: Any, folder: Path, **arguments: Any) -> tuple[nn.Module, dict[str, Any]]:
    try:
        return model_class.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True, **arguments
        )
    except Exception as error:  # whatever a file's content makes transformers, safetensors or torch raise
        raise InputError(f"the weights do not load into {model_class.__name__}: {one_line(error)}") from None


def _preprocessing(transformers: Any, folder: Path, config: Any) -> Preprocessing | None:
    """Convert the image processor; None if a resize and a centre crop cannot express it.

    Some processors do more than their configuration says. The converted `Preprocessing` is therefore compared with the
    processor on an image, and dropped if the results differ. If the processor pads the image (SAM), a plain resize replaces
    it, with a warning. If there is no processor, the usual preprocessing for ImageNet is assumed, also with a warning.
    """
    files = [folder / name for name in _PROCESSOR_FILES if (folder / name).is_file()]
    if not files:
        size = getattr(config, "image_size", None)
        size = (size, size) if isinstance(size, int) else size
        return assume_imagenet_preprocessing((int(size[0]), int(size[1]))) if isinstance(size, (tuple, list)) else None
    contents = [read_json(file) for file in files]
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        image = _test_image()
        theirs = torch.as_tensor(np.asarray(processor(image, return_tensors="pt")["pixel_values"]))
    except Exception as error:  # torchvision cannot be imported, the class is unknown, or its code would have to be run
        return _preprocessing_without_comparison(contents[0].get("image_processor", contents[0]), error)
    if theirs.ndim != 4 or theirs.shape[:2] != (1, 3):
        return None
    settings = processor.to_dict()
    height, width = theirs.shape[2:]
    if settings.get("do_pad") or "longest_edge" in (settings.get("size") or ()):
        ours = _convert(settings | {"size": {"height": height, "width": width}, "do_center_crop": False})
        return ours and resize_without_padding(ours.size, mean=ours.mean, std=ours.std, interpolation=ours.interpolation)
    ours = _convert(settings)
    if ours is None or ours.size != (height, width):
        return None
    # The two resize with different rounding, so up to 2 grey levels (of 255) are allowed on average.
    grey_levels = (ours(image)[None] - theirs).abs() * torch.tensor(ours.std)[:, None, None] * 255
    return ours if grey_levels.mean() < 2 else None


def _convert(settings: Mapping[str, Any]) -> Preprocessing | None:
    try:
        return preprocessing_from_settings(settings)
    except (InputError, KeyError, TypeError, ValueError):
        return None


def _preprocessing_without_comparison(settings: Mapping[str, Any], error: Exception) -> Preprocessing | None:
    """Convert the settings of a processor that cannot be run, and warn that they were not compared with it."""
    preprocessing = _convert(settings)
    if preprocessing is not None:
        warnings.warn(
            f"this model's image processor cannot be run here ({one_line(error)}); photographs are prepared according to its "
            "configuration alone",
            AssumptionWarning,
            stacklevel=2,
        )
    return preprocessing


def _test_image() -> Image.Image:
    """Return an image with a different ramp in each channel, which any other crop, channel order or scaling would change."""
    rows, cols = np.mgrid[:60, :90]
    return Image.fromarray(np.stack([rows * 4, cols * 2, 250 - 2 * rows - cols], axis=-1).astype(np.uint8))


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence transformers' progress bars and loading reports, whose content this module's errors repeat."""
    logging = transformers.utils.logging
    level, progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if progress_bar:
            logging.enable_progress_bar()
