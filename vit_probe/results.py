"""What a measure returns: arrays and a tidy table, with the provenance of every number; saving and reading it."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass, fields
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn, strided, uint8

from vit_probe.atomic_io import write_bytes
from vit_probe.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GenericResult", "KeyNumber", "Result", "check_finite", "read_result", "software_versions", "weights_sha256"]

KeyNumber = tuple[str, str, float]
"""Name, unit and value of a number that says much about a model."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Result:
    """Base of all results; each is a frozen dataclass of arrays, dictionaries of arrays, and plain values.

    Args:
        measure: Name of the measure that the numbers come from.
        provenance: Model, hash of its weights, images, options and versions that the numbers come from.
    """

    measure: str
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        # As JSON will give it back, so that a saved result equals the one that was saved.
        object.__setattr__(self, "provenance", json.loads(json.dumps(self.provenance, default=str)))

    def __repr__(self) -> str:
        """Arrays by their shapes; the provenance is left out."""

        def shown(value: Any) -> str:
            if isinstance(value, dict):
                return "{" + ", ".join(f"{name!r}: {shown(one)}" for name, one in value.items()) + "}"
            return str(value.shape) if isinstance(value, np.ndarray) else repr(value)

        values = (f"{field.name}={shown(getattr(self, field.name))}" for field in fields(self) if field.name != "provenance")
        return f"{type(self).__name__}({', '.join(values)})"

    def to_dataframe(self) -> pd.DataFrame:
        """The numbers as a tidy table, one row per observation."""
        raise NotImplementedError

    def csv_table(self) -> pd.DataFrame:
        """The table that is written as CSV beside the picture."""
        return self.to_dataframe()

    def summary(self) -> pd.DataFrame:
        """The few rows that say the most."""
        raise NotImplementedError

    def key_numbers(self) -> list[KeyNumber]:
        """The numbers by which models are compared; see `vit_probe.measures.overview`."""
        return []

    @property
    def panel_title(self) -> str:
        """Title of the result's panel in the overview."""
        return self.measure.replace("_", " ").capitalize()

    def plot_panel(self, *, ax: Axes) -> Axes:
        """Draw the result on axes that are small."""
        return self.plot(ax=ax)

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Draw the result on `ax`, or on the axes of a new figure, and return the axes."""
        raise NotImplementedError

    def save(self, path: str | Path) -> Path:
        """Write one file: arrays as safetensors, the rest as its metadata. An older file is replaced whole or not at all."""
        arrays: dict[str, np.ndarray] = {}
        plain: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, dict) and value and all(isinstance(one, np.ndarray) for one in value.values()):
                arrays |= {f"{field.name}/{name}": np.ascontiguousarray(one) for name, one in value.items()}
                plain[field.name] = {_ARRAYS: list(value)}  # safetensors does not keep the order
            elif isinstance(value, np.ndarray):
                arrays[field.name] = np.ascontiguousarray(value)
            else:
                plain[field.name] = value
        # Not sorted: the order of the named values is part of the result.
        content = json.dumps({"type": type(self).__name__, "values": plain}, default=str)
        return write_bytes(path, save(arrays, metadata={"vit_probe": content}))


_ARRAYS = "arrays"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class GenericResult(Result):
    """A saved result of a measure that this installation does not know.

    Args:
        contents: Its arrays and plain values, by name.
    """

    contents: dict[str, Any]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per array or value: name, shape of an array, type."""
        rows = [
            (name, str(value.shape), str(value.dtype)) if isinstance(value, np.ndarray) else (name, "", type(value).__name__)
            for name, value in self.contents.items()
        ]
        return pd.DataFrame(rows, columns=["name", "shape", "type"])

    def summary(self) -> pd.DataFrame:
        """The table itself."""
        return self.to_dataframe()

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Raise InputError: how to draw the result is known to the measure alone."""
        raise InputError(
            f"this installation does not know the measure {self.measure!r}, and cannot draw its result; define the measure, or "
            "import the module that does, before load_result, or draw the arrays in `contents`"
        )


def read_result(path: str | Path) -> tuple[str, dict[str, Any]]:
    """Name of the result's class, and its fields, as `Result.save` wrote them.

    Raises:
        InputError: If the file does not exist, or is not a result.
    """
    if not isinstance(path, str | PathLike):
        raise InputError(f"a result is read from the path of the file that its save() wrote, got {path!r:.80}; pass that")
    try:
        if not Path(path).is_file():  # opening a named pipe would wait for whoever writes into it
            found = f"{Path(path)} is not a regular file" if Path(path).exists() else f"there is no result file {path}"
            raise InputError(f"{found}; pass the path of a file that a result's save() wrote")
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        if "vit_probe" not in metadata:
            raise InputError(f"{path} is a safetensors file, but not a saved result of vit_probe")
        content = json.loads(metadata["vit_probe"])
        values: dict[str, Any] = {name: array for name, array in arrays.items() if "/" not in name}
        for name, value in content["values"].items():
            names = value.get(_ARRAYS) if isinstance(value, dict) else None
            values[name] = value if names is None else {one: arrays[f"{name}/{one}"] for one in names}
        return str(content["type"]), values | {"measure": str(values["measure"])}
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(f"{path} is not a saved result ({error})") from None
    except Exception as error:  # a damaged or foreign file can raise anything
        raise InputError(f"{path} is not a saved result: its description is damaged ({error!r})") from None


def check_finite(values: np.ndarray, what: str) -> None:
    """Raise InputError if `values` holds NaN or infinity."""
    if not np.isfinite(values).all():
        raise InputError(f"{what} are not all finite; the model's weights or the images hold NaN or infinity, or overflow")


def weights_sha256(model: nn.Module) -> str:
    """A hash of all parameters, buffers and other state, by name: the same for the same weights, on any device."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        for part in value if isinstance(value, tuple | list) else (value,):  # quantised layers pack weights and bias
            digest.update(_content(part))
    return digest.hexdigest()


def _content(value: Any) -> Any:
    if not isinstance(value, Tensor):  # `nn.Module.get_extra_state` may return anything
        return repr(value).encode()
    value = value.detach().cpu().resolve_conj().resolve_neg()
    value = value.dequantize() if value.is_quantized else value.to_dense() if value.layout != strided else value
    return value.contiguous().flatten().view(uint8).numpy()


def software_versions() -> dict[str, str]:
    """Versions that the numbers may depend on."""
    names = {"vit_probe": "vit-probe", "torch": "torch", "numpy": "numpy", "scikit-learn": "scikit-learn", "pillow": "pillow"}
    return {"python": platform.python_version()} | {name: version(package) for name, package in names.items()}
