"""Converting the settings of transformers' image processors to `Preprocessing`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
_REQUIRED = {"size", "resample", "image_mean", "image_std"}
_SIZE_KEYS = {"height", "width", "shortest_edge", "longest_edge", "max_height", "max_width"}
_PROCESSOR_OF_MODEL_TYPE = {"vit": "ViT", "vit_mae": "ViT", "deit": "DeiT", "dinov2": "Bit", "dinov2_with_registers": "Bit"}


def preprocessing_from_processor(
    model_type: str, config: ViTConfig, processor: Mapping[str, Any] | None
) -> Preprocessing | None:
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
            extractors of the same names; sizes as numbers or as dictionaries. Of other processors, files that state every
            setting are converted.

    Returns:
        The preprocessing, or None where `preprocessing_from_settings` returns None.

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
    if class_name and not named:
        return preprocessing_from_settings(processor) if processor.keys() >= _REQUIRED else None
    family = named[0] if named else _PROCESSOR_OF_MODEL_TYPE[model_type]
    return preprocessing_from_settings(_DEFAULT_SETTINGS[family] | dict(processor), int_is_square=family != "Bit")


def preprocessing_from_settings(settings: Mapping[str, Any], *, int_is_square: bool | None = None) -> Preprocessing | None:
    """Convert the settings of any image processor that resizes, crops at the centre and standardises.

    Args:
        settings: Under the names of `preprocessor_config.json`, including every one that the processor uses.
        int_is_square: Whether a resize to a single number is to a square of that side, or the shorter side is resized to it;
            None if that is not known.

    Returns:
        The preprocessing; None if `Preprocessing` cannot express it: no resize, a bounded longer side, padding, images of
        different sizes as the result, other than three channels, or a single number of unknown meaning.

    Raises:
        InputError: If a size or the resampling filter has an unknown form.

    Examples:
        >>> settings = {"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True, "resample": 3}
        >>> preprocessing = preprocessing_from_settings(settings | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
        >>> preprocessing.resize, preprocessing.size, preprocessing.interpolation
        (256, (224, 224), 'bicubic')
    """
    if settings["resample"] not in _RESAMPLING:
        raise InputError(f"preprocessor_config.json has resample={settings['resample']!r}; supported are 0 to 3")
    resize = _parse_size(settings["size"], int_is_square=int_is_square)
    size = _parse_size(settings["crop_size"], int_is_square=True) if settings.get("do_center_crop") else resize
    more = settings.get("do_pad") or settings.get("crop_pct") or not settings.get("do_resize", True)
    if resize is None or not isinstance(size, tuple) or more:
        return None
    if any(resized < cropped for resized, cropped in zip(as_pair(resize, "size"), size, strict=True)):
        return None  # the crop pads, for which transformers' own implementations have different rules
    # A value from 0 to 255 becomes (value * factor - mean) / std, in `Preprocessing` (value / 255 - mean) / std.
    scale = 255 * (settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1)
    normalize = settings.get("do_normalize", True)
    mean = _per_channel(settings["image_mean"] if normalize else 0, scale)
    std = _per_channel(settings["image_std"] if normalize else 1, scale)
    if len(mean) != 3 or len(std) != 3:
        return None
    interpolation = _RESAMPLING[settings["resample"]]
    return Preprocessing(size, resize, as_triple(mean), as_triple(std), interpolation, crop_rounding="down")


def _usual(model_type: str, config: ViTConfig) -> Preprocessing:
    size = as_pair(config.image_size, "image_size")
    if model_type == "vit_mae":
        return Preprocessing(size, size, interpolation="bilinear", crop_rounding="down")
    if model_type == "vit":
        return Preprocessing(size, size, mean=_HALF, std=_HALF, interpolation="bilinear", crop_rounding="down")
    patch_height, patch_width = config.patch_stride
    if model_type.startswith("dinov2") and 224 % patch_height == 224 % patch_width == 0:
        size = 224, 224  # their position table is for 518 pixels, but they are published for images of 224
    scaled = round(size[0] * 256 / 224), round(size[1] * 256 / 224)
    resize = scaled if model_type == "deit" else max(scaled)
    return Preprocessing(size, resize, IMAGENET_MEAN, IMAGENET_STD, interpolation="bicubic", crop_rounding="down")


def _parse_size(value: Any, *, int_is_square: bool | None) -> int | tuple[int, int] | None:
    """Return the shorter side as an int, the exact height and width as a pair, or None for anything else that is known."""
    if isinstance(value, int):
        return None if int_is_square is None else (value, value) if int_is_square else value
    given = {key: length for key, length in value.items() if length is not None} if isinstance(value, Mapping) else {}
    if given.keys() == {"height", "width"}:
        return int(given["height"]), int(given["width"])
    if given.keys() == {"shortest_edge"}:
        return int(given["shortest_edge"])
    if given and given.keys() <= _SIZE_KEYS:
        return None
    raise InputError(f"preprocessor_config.json gives a size as {value!r}; supported are height and width, or shortest_edge")


def _per_channel(value: Any, scale: float) -> list[float]:
    """The value of each channel, of which the file gives a list, or one number for all."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value] * 3
    return [float(number) / scale for number in values]
