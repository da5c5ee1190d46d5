"""Converting another source's parameter names to this package's, by tables of substitutions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vit_probe.errors import InputError

__all__ = ["concatenate_parameters", "rename_parameters"]


def rename_parameters(
    state: Mapping[str, Tensor], substitutions: Iterable[tuple[str, str]], *, drop: str = "(?!)"
) -> dict[str, Tensor]:
    """Rename parameters by regular expressions, all applied to each name one after another.

    Args:
        state: Parameters by name.
        substitutions: Regular expressions and their replacements. A name that matches none is kept.
        drop: A regular expression; parameters whose original name starts with a match are left out. By default none are.

    Raises:
        InputError: If two parameters get the same name.

    Examples:
        >>> from torch import zeros
        >>> sorted(rename_parameters({"ln.bias": zeros(2), "mask": zeros(1)}, [(r"^ln\\.", "norm.")], drop="mask"))
        ['norm.bias']
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if re.match(drop, name):
            continue
        new_name = name
        for pattern, replacement in substitutions:
            new_name = re.sub(pattern, replacement, new_name)
        if new_name in renamed:
            raise InputError(f"the checkpoint holds {new_name} twice, once as {name}")
        renamed[new_name] = value
    return renamed


def concatenate_parameters(state: Mapping[str, Tensor], parts: tuple[str, ...], whole: str) -> dict[str, Tensor]:
    """Concatenate modules that are stored in parts, such as query, key and value, along their outputs.

    Args:
        state: Parameters by name.
        parts: Names of the parts' modules, in order. Where one is missing, the others are left unchanged.
        whole: Name of the module that replaces them.

    Examples:
        >>> from torch import zeros
        >>> state = {"attn.query.bias": zeros(4), "attn.key.bias": zeros(4), "attn.value.bias": zeros(4)}
        >>> concatenate_parameters(state, ("query", "key", "value"), "qkv")["attn.qkv.bias"].shape
        torch.Size([12])
    """
    joined = dict(state)
    for name in state:
        path, _, kind = name.rpartition(".")
        parent, _, module = path.rpartition(".")
        names = [f"{parent}.{part}.{kind}" for part in parts]
        if module == parts[0] and all(part in state for part in names):
            joined[f"{parent}.{whole}.{kind}"] = torch.cat([joined.pop(part) for part in names])
    return joined
