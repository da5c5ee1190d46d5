"""Turning another source's parameter names into ours, by tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vit_probe.errors import InputError

__all__ = ["join", "rename"]


def rename(state: Mapping[str, Tensor], table: Iterable[tuple[str, str]], *, drop: str = "(?!)") -> dict[str, Tensor]:
    """The same parameters, each name put through the table's substitutions one after another.

    Args:
        state: Parameters by name.
        table: Regular expressions and what replaces them. A name that none fits stays as it is.
        drop: A regular expression; parameters whose original name begins with a match are left out.

    Raises:
        InputError: If two parameters end with the same name.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if re.match(drop, name):
            continue
        new = name
        for pattern, replacement in table:
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise InputError(f"the checkpoint holds {new} twice, once as {name}")
        renamed[new] = value
    return renamed


def join(state: Mapping[str, Tensor], parts: tuple[str, ...], whole: str) -> dict[str, Tensor]:
    """Concatenates what is stored in parts, such as query, key and value, along the outputs.

    Args:
        state: Parameters by name.
        parts: Names of the parts' modules, in order. Where one is missing the others stay as they are.
        whole: Name of the module that takes their place.
    """
    joined = dict(state)
    for name in state:
        path, _, kind = name.rpartition(".")
        parent, _, module = path.rpartition(".")
        names = [f"{parent}.{part}.{kind}" for part in parts]
        if module == parts[0] and all(part in state for part in names):
            joined[f"{parent}.{whole}.{kind}"] = torch.cat([joined.pop(part) for part in names])
    return joined
