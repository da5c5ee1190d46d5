"""Converting the settings of transformers' image processors to `Preprocessing`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vit_probe.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Interpolation, Preprocessing, as_triple
from vit_probe.errors import InputError
from vit_probe.models.config import ViTConfig, as_pair

__all__ = ["preprocessing_from_processor", "preprocessing_from_settings"]

_HALF = (0.5, 0.5, 0.5)
_RESAMPLING: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}

# The processor classes' own defaults, for keys that the file leaves out.
_DEFAULT_SETTINGS: dict[str, dict[str, Any]] = {
    "ViT": {"size": 224, "resample": 2, "do_center_crop": False, "image_mean": _HALF, "image_std": _HALF},
    "DeiT": {"size": 256, "crop_size": 224, "resample": 3, "do_center_crop": True, "image_mean": _HALF, "image_std": _HALF},
    "Bit": {"size": 224, "crop_size": 224, "resample": 3, "do_center_crop": True}
    | {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)},
}
_PROCESSOR_OF_MODEL_TYPE = {"vit": "ViT", "vit_mae": "ViT", "deit": "DeiT", "dinov2": "Bit", "dinov2_with_registers": "Bit"}


def preprocessing_from_processor(model_type: str, config: ViTConfig, processor: Mapping[str, Any] | None) -> Preprocessing:
    """Convert `preprocessor_config.json`, or return the model type's usual preprocessing if there is no such file.

    The usual preprocessing is

    - for ViT, a resize to the model's image size, with mean and standard deviation 0.5;
    - for MAE, the same with ImageNet's mean and standard deviation;
    - for DeiT, a resize to 256/224 of the image size and a centre crop, with ImageNet's mean and standard deviation;
    - for DINOv2, the shorter side resized to 256 and a centre crop of 224, with ImageNet's mean and standard deviation, as all
      its published models have it.

    Args:
        model_type: The model's type in transformers.
        config: The model's configuration.
        processor: Content of the file, for `ViTImageProcessor`, `DeiTImageProcessor`, `BitImageProcessor` or the feature
            extractors of the same names; sizes as numbers or as dictionaries.

    Raises:
        InputError: If a size or the resampling filter has an unknown form.

    Examples:
        >>> preprocessing_from_processor("vit", ViTConfig(image_size=384), None).resize
        (384, 384)
    """
    if processor is None:
        return _usual(model_type, config)
    class_name = str(processor.get("image_processor_type") or processor.get("feature_extractor_type") or "")
    named = re.match("|".join(_DEFAULT_SETTINGS), class_name)
    settings = _DEFAULT_SETTINGS[named[0] if named else _PROCESSOR_OF_MODEL_TYPE[model_type]] | dict(processor)
    return preprocessing_from_settings(settings, int_is_square=not (named and named[0] == "Bit"))


def preprocessing_from_settings(settings: Mapping[str, Any], *, int_is_square: bool = True) -> Preprocessing:
    """Convert the settings of any image processor that resizes, crops at the centre and standardises.

    Args:
        settings: Under the names of `preprocessor_config.json`, including every one that the processor uses.
        int_is_square: Whether a resize to a single number is to a square of that side; otherwise it is the shorter side.

    Raises:
        InputError: If a size or the resampling filter has an unknown form.

    Examples:
        >>> settings = {"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True, "resample": 3}
        >>> preprocessing = preprocessing_from_settings(settings | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
        >>> preprocessing.resize, preprocessing.size, preprocessing.interpolation
        (256, (224, 224), 'bicubic')
    """
    resize = _parse_size(settings["size"], int_is_square=int_is_square)
    crop = _parse_size(settings["crop_size"], int_is_square=True) if settings.get("do_center_crop") else resize
    if settings["resample"] not in _RESAMPLING:
        raise InputError(f"preprocessor_config.json has resample={settings['resample']!r}; supported are 0 to 3")
    normalize = settings.get("do_normalize", True)
    size = as_pair(crop, "crop_size")
    return Preprocessing(
        size=size,
        resize=resize if settings.get("do_resize", True) else size,
        mean=as_triple(settings["image_mean"] if normalize else (0, 0, 0)),
        std=as_triple(settings["image_std"] if normalize else (1, 1, 1)),
        interpolation=_RESAMPLING[settings["resample"]],
    )


def _usual(model_type: str, config: ViTConfig) -> Preprocessing:
    size = as_pair(config.image_size, "image_size")
    if model_type == "vit_mae":
        return Preprocessing(size, size, interpolation="bilinear")
    if model_type == "vit":
        return Preprocessing(size, size, mean=_HALF, std=_HALF, interpolation="bilinear")
    patch_height, patch_width = config.patch_stride
    if model_type.startswith("dinov2") and 224 % patch_height == 224 % patch_width == 0:
        size = 224, 224  # their position table is for 518 pixels, but they are published for images of 224
    scaled = round(size[0] * 256 / 224), round(size[1] * 256 / 224)
    return Preprocessing(
        size, scaled if model_type == "deit" else max(scaled), mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bicubic"
    )


def _parse_size(value: Any, *, int_is_square: bool) -> int | tuple[int, int]:
    """Return the shorter side as an int, or the exact height and width as a pair."""
    if isinstance(value, int):
        return (value, value) if int_is_square else value
    if isinstance(value, Mapping) and {"height", "width"} <= set(value):
        return int(value["height"]), int(value["width"])
    if isinstance(value, Mapping) and "shortest_edge" in value:
        return int(value["shortest_edge"])
    raise InputError(f"preprocessor_config.json gives a size as {value!r}; supported are height and width, or shortest_edge")
