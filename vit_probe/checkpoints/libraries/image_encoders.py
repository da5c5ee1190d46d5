"""Finding the part of a transformers model that takes images alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from vit_probe.errors import InputError

__all__ = ["describe_inputs", "find_classes", "find_image_part"]

_VIDEO_FIELDS = ("num_frames", "frames_per_clip", "tubelet_size")


def find_classes(transformers: Any, config: Any) -> tuple[list[Any], Any]:
    """Return the classes that may hold a configuration's image encoder, and the class of the model that was saved.

    Args:
        transformers: The library.
        config: The configuration of the model that was saved.

    Returns:
        Classes that take nothing but images, the smallest first; and the saved model's own class, or None if the configuration
        names none.

    Raises:
        InputError: If the model takes videos.
    """
    vision_config = getattr(config, "vision_config", None)
    base = _base_class(transformers, config)
    _reject_videos(config, vision_config, base)
    saved = getattr(transformers, str((getattr(config, "architectures", None) or [""])[0]), None)
    saved = saved if getattr(saved, "config_class", None) is type(config) else base
    classes = [found for found in dict.fromkeys([base, saved]) if _takes_images_alone(found)]
    encoder = _base_class(transformers, vision_config)
    if getattr(encoder, "main_input_name", None) == "pixel_values":
        classes.insert(0, encoder)  # also SigLIP 2's, which asks where the patches lie: its filters can be looked at
    return classes, saved


def find_image_part(model_class: Any, config: Any) -> str | None:
    """Return the name of the outermost module of a model that takes nothing but images; None if there is none.

    Args:
        model_class: A class of transformers, or None.
        config: Its configuration.
    """
    if model_class is None:
        return None
    try:
        with torch.device("meta"):  # without memory for its parameters
            model = model_class(config)
    except Exception:  # whatever transformers raises for a configuration that it cannot build
        return None
    return next((name for name, module in model.named_modules() if name and _takes_images_alone(type(module))), None)


def describe_inputs(model_class: Any) -> str:
    """Return the end of a sentence that says what a model takes instead of images.

    Args:
        model_class: A class of transformers, or None.
    """
    if model_class is None:
        return "does not take images"
    needed = _required_inputs(model_class) or [getattr(model_class, "main_input_name", "")]
    return f"does not take images alone: {model_class.__name__} is called with {', '.join(needed)}"


def _base_class(transformers: Any, config: Any) -> Any:
    """Return the class of a configuration's model without a head; None if there is none."""
    if config is None or type(config) not in transformers.MODEL_MAPPING:
        return None
    found = transformers.MODEL_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _reject_videos(config: Any, vision_config: Any, model_class: Any) -> None:
    if vision_config is None and not getattr(model_class, "main_input_name", "pixel_values").startswith("pixel_values"):
        return  # Perceiver has a number of frames, too
    for part in (config, vision_config):
        for field in _VIDEO_FIELDS:
            if getattr(part, field, None) is not None:
                raise InputError(
                    f"a model of type {config.model_type!r} takes videos ({field}={getattr(part, field)}), not single images"
                )


def _takes_images_alone(model_class: Any) -> bool:
    """Return whether a class is a model that takes `pixel_values`, no text, and nothing else that has no default."""
    if not hasattr(model_class, "main_input_name"):  # None, or a layer such as the patch embedding
        return False
    names = list(inspect.signature(model_class.forward).parameters)
    return (
        "pixel_values" in names
        and not any(name.endswith("input_ids") for name in names)
        and set(_required_inputs(model_class)) <= {"pixel_values"}
    )


def _required_inputs(model_class: Any) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(model_class.forward).parameters.values())[1:]  # without self
    return [each.name for each in parameters if each.default is inspect.Parameter.empty and each.kind in kinds]
