"""Reading saved results as the type they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from math import isfinite
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from jaxtyping import Shaped, jaxtyped

from vit_probe.errors import InputError
from vit_probe.measures.base.discovery import exports
from vit_probe.measures.base.per_head import HeadResult
from vit_probe.measures.base.per_layer import LayerResult
from vit_probe.measures.base.registry import result_class
from vit_probe.results import GenericResult, Result, read_result

__all__ = ["load_result"]

# Results of measures that users define have one of these types, whatever their measure is called.
_GENERAL = {"HeadResult": HeadResult, "LayerResult": LayerResult}
_PROVENANCE: dict[str, type] = {"model": dict, "images": dict, "grid": dict, "skipped": dict, "options": dict, "versions": dict}


def load_result(path: str | Path) -> Result:
    """Read the result that `Result.save` wrote to `path`, as the type it was.

    The file names its measure. A measure of this package, or one that has been defined in this process, is looked up in the
    registry; nothing that a file names is imported. The result of any other measure is read as the general type of measures
    with values per head or per layer, or else as a `GenericResult`.

    Raises:
        InputError: If the file does not exist, is not a result, or is damaged: if a field has another type, or an array another
            shape.

    Examples:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> from vit_probe import load_model, load_result, mean_attention_distance
        >>> with TemporaryDirectory() as folder:
        ...     saved = mean_attention_distance(load_model("demo"), torch.zeros(1, 3, 64, 64)).save(f"{folder}/d.safetensors")
        ...     load_result(saved).distance.shape
        (9, 6)
    """
    kind, values = read_result(path)
    name = values["measure"]
    known = result_class(name) or _unregistered(name, kind) or _GENERAL.get(kind) or _by_fields(values)
    if known is None:
        known = GenericResult
        values = {"measure": name, "provenance": values.pop("provenance", {}), "contents": values}
        values["contents"].pop("measure")
    expected = {field.name for field in fields(known)}
    if expected != values.keys():
        odd = ", ".join(sorted(expected ^ values.keys()))
        raise InputError(f"{path} is not a result of {name} as this version writes it: {odd} differ; measure again")
    try:
        result = known(**values)
        _check_types(result)
    except Exception as error:  # whatever damaged values raise where they are used
        raise InputError(f"{path} is damaged ({error}); measure again") from None
    return result


def _check_types(result: Result) -> None:
    """Raise TypeError unless every field has its type, and axes of one name have one length."""
    try:
        hints = get_type_hints(type(result), include_extras=True)
    except NameError:  # a user's class may name types that only type checkers import
        return
    with jaxtyped("context"):
        for field in fields(result):
            value, hint = getattr(result, field.name), hints[field.name]
            if not _fits(value, hint):
                got = f"an array of {value.dtype} {value.shape}" if isinstance(value, np.ndarray) else repr(value)[:80]
                raise TypeError(f"{field.name} is {got}")
    for name, kind in _PROVENANCE.items():
        if not isinstance(result.provenance.get(name, kind()), kind):
            raise TypeError(f"provenance has {name} {result.provenance[name]!r:.80}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has a type, in its parts, too."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:  # a list along an axis of arrays
        return _fits(value, args[0]) and isinstance(np.empty(len(value)), Shaped[np.ndarray, args[1]])
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is list:
        return isinstance(value, list) and all(_fits(one, args[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(one, args[1]) for one in value.values())
    if hint is Any:
        return True
    if hint is int:  # counts and indices
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    return isinstance(value, hint)


def _by_fields(values: Mapping[str, Any]) -> type[Result] | None:
    """The general type with these fields, for a user's result class that adds methods to it."""
    return next((one for one in _GENERAL.values() if {field.name for field in fields(one)} == values.keys()), None)


def _unregistered(name: str, kind: str) -> type[Result] | None:
    """The result of a function of this package that is not a measure of one model on images, such as `deletion`."""
    if exports().get(kind) != name:
        return None
    found = getattr(import_module(f"vit_probe.measures.{exports()[kind]}"), kind)
    return found if isinstance(found, type) and issubclass(found, Result) else None
