"""Reading saved results as the type they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from vit_probe.errors import InputError
from vit_probe.measures.base.discovery import exports
from vit_probe.measures.base.per_head import HeadResult
from vit_probe.measures.base.per_layer import LayerResult
from vit_probe.measures.base.registry import result_class
from vit_probe.results import GenericResult, Result, read_result

__all__ = ["load_result"]

# Results of measures that users define have one of these types, whatever their measure is called.
_GENERAL = {"HeadResult": HeadResult, "LayerResult": LayerResult}


def load_result(path: str | Path) -> Result:
    """Read the result that `Result.save` wrote to `path`, as the type it was.

    The file names its measure. A measure of this package, or one that has been defined in this process, is looked up in the
    registry; nothing that a file names is imported. The result of any other measure is read as the general type of measures
    with values per head or per layer, or else as a `GenericResult`.

    Raises:
        InputError: If the file does not exist, or is not a result.

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
        provenance = values.pop("provenance", {})
        return GenericResult(measure=values.pop("measure"), provenance=provenance, contents=values)
    expected = {field.name for field in fields(known)}
    if expected != values.keys():
        odd = ", ".join(sorted(expected ^ values.keys()))
        raise InputError(f"{path} is not a result of {name} as this version writes it: {odd} differ; measure again")
    return known(**values)


def _by_fields(values: Mapping[str, Any]) -> type[Result] | None:
    """The general type with these fields, for a user's result class that adds methods to it."""
    return next((one for one in _GENERAL.values() if {field.name for field in fields(one)} == values.keys()), None)


def _unregistered(name: str, kind: str) -> type[Result] | None:
    """The result of a function of this package that is not a measure of one model on images, such as `deletion`."""
    if exports().get(kind) != name:
        return None
    found = getattr(import_module(f"vit_probe.measures.{exports()[kind]}"), kind)
    return found if isinstance(found, type) and issubclass(found, Result) else None
