"""Checking the sizes in a configuration, before a library takes memory for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from vit_probe.checkpoints.checkpoint import MAX_SIDE
from vit_probe.errors import InputError

__all__ = ["check_depth", "check_sides"]

_SIDE = r"(crop_)?size|height|width|shortest_edge"
_DEPTH = r"depths?|(.*_)?(num|encoder|decoder|hidden)_layers|layers"


def check_depth(config: Mapping[str, Any], num_parameters: int) -> None:
    """Check that a configuration has no more layers than the weights have parameters.

    Args:
        config: Content of `config.json` of any library.
        num_parameters: How many parameters the weights hold, each of any shape.

    Raises:
        InputError: If it has more, or fewer than one.

    Examples:
        >>> check_depth({"model_type": "clip", "vision_config": {"num_hidden_layers": 12}}, num_parameters=199)
    """
    for name, value in _entries(config):
        fewest = 1 if name == "num_hidden_layers" else 0  # optional parts may have no layers
        if re.fullmatch(_DEPTH, name) and isinstance(value, int) and not fewest <= value <= num_parameters:
            raise InputError(f"config.json has {name} {value}, but the weights hold {num_parameters} parameters")


def check_sides(processor: Mapping[str, Any]) -> None:
    """Check that an image processor's configuration states no side that would fill the memory.

    A longest edge is not checked: it only bounds the side, and in some models it is a number of pixels.

    Args:
        processor: Content of `preprocessor_config.json`.

    Raises:
        InputError: If a side is longer than 16,384 pixels.

    Examples:
        >>> check_sides({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}})
    """
    size = processor.get("size")
    bounded = isinstance(size, Mapping) and size.get("longest_edge") is not None
    for name, value in _entries({key: entry for key, entry in processor.items() if not (bounded and key == "size")}):
        if re.fullmatch(_SIDE, name) and isinstance(value, (int, float)) and value > MAX_SIDE:
            raise InputError(f"the image processor has {name} {value}; at most {MAX_SIDE} pixels are supported")


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield names and values of a configuration and of those inside it; of lists, every element."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _entries(value)
        elif isinstance(value, list):
            yield from ((name, element) for element in value)
        else:
            yield name, value
