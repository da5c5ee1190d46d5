"""Reading tensors, arrays and configurations from files, without ever running code that a file contains."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vit_probe.checkpoints.pickles import load_pickle
from vit_probe.checkpoints.state_dicts import find_state
from vit_probe.errors import InputError

__all__ = [
    "TENSOR_SUFFIXES",
    "WEIGHT_FILES",
    "expand_home",
    "file_format",
    "read_arrays",
    "read_content",
    "read_folder",
    "read_json",
    "read_tensors",
]

Format = Literal["npz", "safetensors", "pickle"]

TENSOR_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names that transformers and timm give to the weights in a folder, the preferred one first; `.index.json` is appended for the
list of shards."""

_SUFFIXES: dict[str, Format] = {
    ".npz": "npz", ".safetensors": "safetensors", ".pt": "pickle", ".pth": "pickle", ".bin": "pickle"
}  # fmt: skip
_FOREIGN = (
    (rb"\x89HDF\r\n", "an HDF5 file, as Keras writes; save the model's weights with PyTorch, or pass Google's .npz"),
    (rb"GGUF", "a GGUF file, whose weights are quantised for llama.cpp; pass the original weights"),
    (rb"\x08[\x01-\x20][\x12\x1a\x22\x3a]", "an ONNX or TensorFlow model; pass the PyTorch weights that it was exported from"),
    (rb".{4}TFL3", "a TensorFlow Lite model; pass the original weights"),
    (rb"version https://git-lfs", "a pointer of Git LFS instead of the file itself; fetch it with `git lfs pull`"),
    (rb"\s*<(!doctype|html|\?xml)", "a web page, perhaps the error page of a failed download; download the file again"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd", "compressed; decompress it first"),
    (rb".{257}ustar", "a tar archive; unpack it first, and pass the file or folder in it"),
)
_FOREIGN_ARCHIVES = (
    (r"(.*/)?code/", "a TorchScript archive, which holds a program; load it with torch.jit.load and save its state_dict()"),
    (r"(.*/)?\.data/extern_modules", "a torch.package archive, which holds a program; save the model's state_dict() instead"),
    (r"(metadata|config)\.json$", "a Keras archive; save the model's weights with PyTorch"),
)


def expand_home(path: str) -> Path:
    """Replace `~` or `~USER` at the beginning of a path by the home directory.

    Raises:
        InputError: If there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"there is no checkpoint {path}: {Path(path).parts[0]} is no user's home directory") from None


def file_format(path: Path) -> Format:
    """Tell a checkpoint's format from its content, or from its name if the content is damaged.

    Raises:
        InputError: If there is no such file, it is no regular file, or it has another format (the message says which).
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}" if not path.exists() else f"{path} is not a regular file")
    with path.open("rb") as file:
        start = file.read(512)
    if start[8:9] == b"{":  # after the length of the header, whose first byte may be any, a pickle's included
        return "safetensors"
    if start[:1] == b"\x80":
        return "pickle"
    for pattern, kind in _FOREIGN:
        if re.match(pattern, start, re.DOTALL | re.IGNORECASE):
            raise InputError(f"{path} is {kind}")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        for foreign, kind in _FOREIGN_ARCHIVES:
            if any(re.match(foreign, name) for name in names):
                raise InputError(f"{path} is {kind}")
        if any(name.endswith("data.pkl") for name in names):
            return "pickle"
        if any(name.endswith(".npy") for name in names):
            return "npz"
    suffix = _SUFFIXES.get(path.suffix)
    if suffix is None:
        raise InputError(
            f"{path} has no known checkpoint format; pass a file that ends in {', '.join(_SUFFIXES)}, or a folder with "
            "config.json"
        )
    return suffix


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a `.npz` archive.

    Raises:
        InputError: If the file is not a `.npz` archive, is truncated or damaged, or holds pickled objects.
    """
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is not an .npz archive, or it is truncated")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise InputError(f"{path} is damaged and cannot be read ({error})") from None
    except ValueError as error:
        raise InputError(f"{path} holds something other than plain arrays, which is never loaded ({error})") from None
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise InputError(f"{path} holds something other than arrays: {name}")
    return arrays


def read_content(path: Path) -> Any:
    """Read everything that a safetensors or PyTorch file holds, onto the CPU.

    Raises:
        InputError: If the file is missing, truncated or damaged, or can only be read by running code.
    """
    match file_format(path):
        case "npz":
            raise InputError(f"{path} is an .npz archive of NumPy arrays, which is read only as a model in Google's layout")
        case "safetensors":
            return _load_safetensors(path)
        case "pickle":
            return load_pickle(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a model's parameters from a safetensors or PyTorch file, onto the CPU; see `find_state` for training checkpoints.

    Raises:
        InputError: If the file is missing, truncated or damaged, can only be read by running code, or holds no parameters.
    """
    return find_state(read_content(path), path)


def read_folder(folder: Path) -> Any:
    """Read the weights of a folder as transformers and timm write it: in one file, or in shards listed by an index.

    Raises:
        InputError: If the folder holds no weights, or a shard is missing or lies outside the folder.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return read_content(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards: dict[str, Any] = {}
            for shard in _shards(index):
                shards |= read_content(folder / shard)
            return shards
    raise InputError(f"the folder {folder} holds no weights; expected {' or '.join(WEIGHT_FILES)}, in one file or in shards")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: If the file is missing or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__} instead of an object")
    return content


def _shards(index: Path) -> list[str]:
    """Return the names of the files that an index lists."""
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, Mapping) else []
    # An index comes from the same source as the weights: it may name files beside it, and no others.
    if not names or not all(
        isinstance(name, str) and name == re.split(r"[/\\]", name)[-1] not in ("", ".", "..") for name in names
    ):
        raise InputError(f"{index} must map parameters to names of files in its own folder (weight_map)")
    missing = [name for name in sorted(set(names)) if not (index.parent / name).is_file()]
    if missing:
        raise InputError(f"{index} lists {', '.join(missing[:10])}, not found in {index.parent}")
    return sorted(set(names))


def _load_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a complete safetensors file ({error})") from None
