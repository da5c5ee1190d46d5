"""Loading transformers' own models, from folders in its layout."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vit_probe.checkpoints.checkpoint import assume_imagenet_preprocessing
from vit_probe.checkpoints.files import read_json
from vit_probe.checkpoints.image_processors import preprocessing_from_settings
from vit_probe.checkpoints.import_library import import_error, import_library, one_line, suggest_similar
from vit_probe.checkpoints.libraries import finish_model, resize_without_padding
from vit_probe.checkpoints.libraries.image_encoders import describe_inputs, find_classes, find_image_part
from vit_probe.checkpoints.sizes import check_sides
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.errors import AssumptionWarning, InputError

__all__ = ["load_folder"]

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load_folder(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    """Load transformers' model with the folder's weights in float32, and with its image processor's preprocessing.

    The model is the first of these that takes nothing but images and fits the weights: the image encoder that the
    configuration names (CLIP, SigLIP, SAM), the model without its head, the model that was saved (Depth Anything and other
    dense models with a ViT inside), and the image encoder inside the latter (LLaVA, BLIP, TrOCR; all of it is read for that).

    Args:
        folder: A folder written by `save_pretrained`: `config.json`, weights and the image processor's configuration.
        config: Content of `config.json`.

    Raises:
        InputError: If transformers is not installed, does not have the model's type or would have to run the folder's code;
            if the configuration is not valid; if no part of the model takes images alone; or if the weights do not fit it.
    """
    model_type = str(config["model_type"])
    transformers = import_library("transformers", f"a model of type {model_type!r}")
    with _quiet(transformers):
        try:
            auto_config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:
            if model_type in transformers.CONFIG_MAPPING:
                raise InputError(
                    f"config.json is no valid configuration of a model of type {model_type!r} ({one_line(error)})"
                ) from None
            similar = suggest_similar(model_type, transformers.CONFIG_MAPPING.keys())
            raise InputError(
                f"transformers {transformers.__version__} has no model of type {model_type!r} ({one_line(error)}){similar}"
            ) from None
        try:
            encoders, saved_class = find_classes(transformers, auto_config)
        except ImportError as error:  # transformers imports the class's module only now
            raise import_error("transformers", f"a model of type {model_type!r}", error) from None
        model = _build_first(encoders, saved_class, auto_config, folder)
        return finish_model(model, _preprocessing(transformers, folder, model.config))


def _build_first(classes: list[Any], saved_class: Any, config: Any, folder: Path) -> Any:
    """Build the first class that the weights fit; if none does, extract the image encoder of the whole model."""
    errors: list[InputError] = []
    for model_class in classes:
        try:
            return _build(model_class, folder)
        except InputError as error:
            errors.append(error)
    part = find_image_part(saved_class, config)
    if part is None:
        raise errors[0] if errors else InputError(f"a model of type {config.model_type!r} {describe_inputs(saved_class)}")
    try:
        return _build_part(saved_class, part, folder)
    except InputError as error:
        raise (errors or [error])[0] from None


def _build_part(model_class: Any, part: str, folder: Path) -> nn.Module:
    """Load a whole model in the precision of its file, and return one part of it in float32."""
    model, report = _from_pretrained(model_class, folder, dtype="auto")
    encoder = model.get_submodule(part)
    missing_pooler = {name for name in report["missing_keys"] if name.startswith(f"{part}.pooler.")}
    if missing_pooler:  # as in TrOCR's files
        encoder.pooler = None  # type: ignore[assignment]
    _check_report(model_class, report | {"missing_keys": set(report["missing_keys"]) - missing_pooler}, (f"{part}.",))
    return encoder.float()


def _build(model_class: Any, folder: Path) -> nn.Module:
    model, report = _from_pretrained(model_class, folder)
    if report["missing_keys"] and all(name.startswith("pooler.") for name in report["missing_keys"]):
        # Pre-trained weights often have no pooler. transformers would initialise one at random; attention does not need it.
        model, report = _from_pretrained(model_class, folder, add_pooling_layer=False)
    own_prefixes = tuple(f"{name}." for name, module in model.named_children() if any(True for _ in module.parameters()))
    _check_report(model_class, report, ("",), (*own_prefixes, f"{model_class.base_model_prefix}."))
    return model


def _check_report(
    model_class: Any, report: Mapping[str, Any], needed: tuple[str, ...], own: tuple[str, ...] | None = None
) -> None:
    """Check that the parameters whose names begin with `needed` were loaded, and that there are no others in `own` modules.

    Unexpected parameters of heads, decoders and other towers are fine; those inside the model's own modules are not.
    """
    missing = [name for name in report["missing_keys"] if name.startswith(needed)]
    wrong_shape = [str(entry) for entry in report["mismatched_keys"] if str(entry[0]).startswith(needed)]  # with both shapes
    unexpected = [name for name in report["unexpected_keys"] if name.startswith(own or needed)]
    unexpected = [name for name in unexpected if not name.endswith("mask_token")]
    problems = (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", wrong_shape))
    listed = [f"{problem}: {', '.join(sorted(names)[:10])}" for problem, names in problems if names]
    if listed:
        raise InputError(f"the weights do not fit {model_class.__name__}; {'; '.join(listed)}")


def _from_pretrained(
    model_class: Any, folder: Path, *, dtype: torch.dtype | str = torch.float32, **arguments: Any
) -> tuple[nn.Module, dict[str, Any]]:
    try:
        return model_class.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True, **arguments
        )
    except Exception as error:  # whatever a file's content makes transformers, safetensors or torch raise
        raise InputError(f"the weights do not load into {model_class.__name__}: {one_line(error)}") from None


def _preprocessing(transformers: Any, folder: Path, config: Any) -> Preprocessing | None:
    """Convert the image processor; None if a resize and a centre crop cannot express it.

    Some processors do more than their configuration says. The converted `Preprocessing` is therefore compared with the
    processor on images of several sizes, and dropped if the results differ. If the processor pads the image (SAM), a plain
    resize replaces it, with a warning. If there is no processor, the usual preprocessing for ImageNet is assumed, also with a
    warning.
    """
    files = [folder / name for name in _PROCESSOR_FILES if (folder / name).is_file()]
    if not files:
        size = _stated(config, "image_size")
        size = (size, size) if isinstance(size, int) else size
        if not isinstance(size, (tuple, list)) or _stated(config, "num_channels") not in (None, 3):
            return None
        return assume_imagenet_preprocessing((int(size[0]), int(size[1])))
    contents = [read_json(file) for file in files]
    for content in contents:
        check_sides(content.get("image_processor", content))
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        theirs = _processed(processor, _test_image(60, 90))
    except Exception as error:  # torchvision cannot be imported, the class is unknown, or its code would have to be run
        return _preprocessing_without_comparison(contents[0].get("image_processor", contents[0]), error)
    if theirs.ndim != 4 or theirs.shape[:2] != (1, 3):
        return None
    settings = processor.to_dict()
    height, width = theirs.shape[2:]
    if settings.get("do_pad") or "longest_edge" in (settings.get("size") or ()):
        unpadded = {"size": {"height": height, "width": width}, "do_center_crop": False, "do_pad": False}
        ours = _convert(settings | unpadded)
        return ours and resize_without_padding(ours.size, mean=ours.mean, std=ours.std, interpolation=ours.interpolation)
    ours = _convert(settings)
    if ours is None or ours.size != (height, width):  # of a processor that keeps proportions, only this image's size
        return None
    return ours if all(_agree(ours, processor, image) for image in _test_images(ours)) else None


def _stated(config: Any, field: str) -> Any:
    """Return a field of the configuration or, if it has none, of its backbone's."""
    value = getattr(config, field, None)
    return getattr(getattr(config, "backbone_config", None), field, None) if value is None else value


def _processed(processor: Any, image: Image.Image) -> Tensor:
    return torch.as_tensor(np.asarray(processor(image, return_tensors="pt")["pixel_values"]))


def _agree(ours: Preprocessing, processor: Any, image: Image.Image) -> bool:
    """Whether both give the same pixels but for rounding: within half a grey level (of 255) on average."""
    prepared, theirs = ours(image)[None], _processed(processor, image)
    if prepared.shape != theirs.shape:
        return False
    return bool(((prepared - theirs).abs() * torch.tensor(ours.std)[:, None, None] * 255).mean() < 0.5)


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


def _test_images(preprocessing: Preprocessing) -> Iterator[Image.Image]:
    """Yield images, wide and high, that leave a margin of each remainder modulo 4, by which the rounding of a crop differs."""
    short = preprocessing.resize if isinstance(preprocessing.resize, int) else max(preprocessing.resize)
    for long in range(short, short + 4):
        sides = short + short // 4, math.ceil(long * (short + short // 4) / short)
        yield from (_test_image(*sides), _test_image(*sides[::-1]))


def _test_image(height: int, width: int) -> Image.Image:
    """Return an image with waves in each channel, which any other crop, scaling or channel order would change."""
    rows, cols = np.mgrid[:height, :width]
    phases = np.stack([rows / 5, cols / 5, (rows + cols) / 7], axis=-1)
    return Image.fromarray((127.5 + 120 * np.sin(phases)).round().astype(np.uint8))


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
