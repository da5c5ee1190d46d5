"""How transformers' image processors prepare photographs, as `Preprocessing`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vit_probe.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Interpolation, Preprocessing, as_triple
from vit_probe.errors import InputError
from vit_probe.models.config import ViTConfig, as_pair

__all__ = ["from_settings", "preprocessing"]

_HALF = (0.5, 0.5, 0.5)
_RESAMPLING: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}

# The processor classes' own defaults, for keys that the file leaves out.
_PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": {"size": 224, "resample": 2, "do_center_crop": False, "image_mean": _HALF, "image_std": _HALF},
    "DeiT": {"size": 256, "crop_size": 224, "resample": 3, "do_center_crop": True, "image_mean": _HALF, "image_std": _HALF},
    "Bit": {"size": 224, "crop_size": 224, "resample": 3, "do_center_crop": True}
    | {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)},
}
_OF_MODEL = {"vit": "ViT", "vit_mae": "ViT", "deit": "DeiT", "dinov2": "Bit", "dinov2_with_registers": "Bit"}


def preprocessing(model_type: str, config: ViTConfig, processor: Mapping[str, Any] | None) -> Preprocessing:
    """What `preprocessor_config.json` says, or the model type's usual preprocessing where there is no such file.

    The latter is, for ViT, the image resized to the model's size with mean and standard deviation 0.5; for MAE the same with
    ImageNet's mean and standard deviation; for DeiT the same as for MAE through a resize to 256/224 of the size and a central
    crop; for DINOv2 the shorter side resized to 256, a central crop of 224 and ImageNet's statistics, as all its published
    models have it.

    Args:
        model_type: The model's type.
        config: The model's configuration.
        processor: What the file holds: of `ViTImageProcessor`, `DeiTImageProcessor` or `BitImageProcessor`, or the feature
            extractors of the same names; sizes as numbers or as dictionaries.

    Raises:
        InputError: If a size or a resampling filter is given in a way that is not known.
    """
    if processor is None:
        return _usual(model_type, config)
    kind = str(processor.get("image_processor_type") or processor.get("feature_extractor_type") or "")
    named = re.match("|".join(_PROCESSORS), kind)
    settings = _PROCESSORS[named[0] if named else _OF_MODEL[model_type]] | dict(processor)
    return from_settings(settings, square=not (named and named[0] == "Bit"))


def from_settings(settings: Mapping[str, Any], *, square: bool = True) -> Preprocessing:
    """The settings of any image processor that resizes, crops at the centre and standardises.

    Args:
        settings: Under the names of `preprocessor_config.json`, none left out that the processor uses.
        square: Whether a size that is a bare number is that of a square, or else of the shorter side.

    Raises:
        InputError: If a size or a resampling filter is given in a way that is not known.
    """
    resize = _size(settings["size"], square=square)
    crop = _size(settings["crop_size"], square=True) if settings.get("do_center_crop") else resize
    if settings["resample"] not in _RESAMPLING:
        raise InputError(f"preprocessor_config.json asks for resampling {settings['resample']!r}; known are 0 to 3")
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
        size = 224, 224
    scaled = round(size[0] * 256 / 224), round(size[1] * 256 / 224)
    return Preprocessing(
        size, scaled if model_type == "deit" else max(scaled), mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bicubic"
    )


def _size(value: Any, *, square: bool) -> int | tuple[int, int]:
    """An int is the shorter side, a pair the exact height and width; a bare number means the latter where `square`."""
    if isinstance(value, int):
        return (value, value) if square else value
    if isinstance(value, Mapping) and {"height", "width"} <= set(value):
        return int(value["height"]), int(value["width"])
    if isinstance(value, Mapping) and "shortest_edge" in value:
        return int(value["shortest_edge"])
    raise InputError(f"preprocessor_config.json gives a size as {value!r}; known are height and width, or shortest_edge")
