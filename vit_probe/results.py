"""What a measure returns: arrays and a tidy table, with the provenance of every number; saving and reading it."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn, uint8

from vit_probe.atomic_io import write_bytes
from vit_probe.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Result", "check_finite", "load_result", "software_versions", "weights_sha256"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Result:
    """Base of all results; each is a frozen dataclass of arrays and plain values.

    Args:
        provenance: Model, hash of its weights, images, options and versions that the numbers come from.
    """

    provenance: dict[str, Any]

    _kinds: ClassVar[dict[str, type[Result]]] = {}

    def __post_init__(self) -> None:
        # As JSON will give it back, so that a saved result equals the one that was saved.
        object.__setattr__(self, "provenance", json.loads(json.dumps(self.provenance, default=str)))

    def __repr__(self) -> str:
        """Arrays by their shapes; the provenance is left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "provenance"}
        shown = (f"{name}={value.shape if isinstance(value, np.ndarray) else repr(value)}" for name, value in values.items())
        return f"{type(self).__name__}({', '.join(shown)})"

    def __init_subclass__(cls) -> None:
        Result._kinds[cls.__name__] = cls

    def to_dataframe(self) -> pd.DataFrame:
        """The numbers as a tidy table, one row an observation."""
        raise NotImplementedError

    def summary(self) -> pd.DataFrame:
        """A few rows that say the most, for a reader in a hurry."""
        raise NotImplementedError

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Draws the result on `ax`, or on a new figure's, and returns the axes."""
        raise NotImplementedError

    def save(self, path: str | Path) -> Path:
        """Writes one file: arrays as safetensors, the rest as its metadata. An older file is replaced whole or not at all."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays = {name: np.ascontiguousarray(value) for name, value in values.items() if isinstance(value, np.ndarray)}
        plain = {name: value for name, value in values.items() if name not in arrays}
        content = json.dumps({"kind": type(self).__name__, "values": plain}, sort_keys=True, default=str)
        return write_bytes(path, save(arrays, metadata={"vit_probe": content}))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            InputError: If the file does not exist, or holds something else.
        """
        result = load_result(path)
        if not isinstance(result, cls):
            raise InputError(f"{path} holds a {type(result).__name__}, not a {cls.__name__}")
        return result


def load_result(path: str | Path) -> Result:
    """Reads the result that `Result.save` wrote to `path`, as the kind it was.

    Raises:
        InputError: If the file does not exist, or is not a result.
    """
    import vit_probe.measures  # noqa: F401  (makes every kind known)

    if not Path(path).is_file():
        raise InputError(f"there is no result file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise InputError(f"{path} is not a saved result ({error})") from None
    if "vit_probe" not in metadata:
        raise InputError(f"{path} is a safetensors file, but not a saved result of vit_probe")
    content = json.loads(metadata["vit_probe"])
    if content["kind"] not in Result._kinds:
        raise InputError(f"{path} holds a result of a kind that this version does not know, {content['kind']}")
    return Result._kinds[content["kind"]](**arrays, **content["values"])


def check_finite(values: np.ndarray, what: str) -> None:
    """Raise InputError if `values` holds NaN or infinity."""
    if not np.isfinite(values).all():
        raise InputError(f"{what} are not all finite; the model's weights or the images hold NaN or infinity, or overflow")


def weights_sha256(model: nn.Module) -> str:
    """A hash of all parameters and buffers, by name: the same for the same weights, on any device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(uint8).numpy())
    return digest.hexdigest()


def software_versions() -> dict[str, str]:
    """Versions that the numbers may depend on."""
    names = {"vit_probe": "vit-probe", "torch": "torch", "numpy": "numpy", "scikit-learn": "scikit-learn", "pillow": "pillow"}
    return {"python": platform.python_version()} | {name: version(package) for name, package in names.items()}
