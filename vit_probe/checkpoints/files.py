"""Reading tensors, arrays and configurations from files, without ever running code that a file contains."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vit_probe.errors import InputError

__all__ = ["TENSOR_SUFFIXES", "WEIGHT_FILES", "read_arrays", "read_folder", "read_json", "read_tensors"]

TENSOR_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names that transformers and timm give to the weights in a folder, the preferred one first; `.index.json` is appended for the
list of shards."""

_WRAPPERS = ("model", "state_dict", "model_state_dict", "teacher")  # keys of training checkpoints; DINO keeps the teacher
_PREFIXES = ("module.", "backbone.")  # of nn.DataParallel; of DINO, beside its projection head


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a `.npz` archive.

    Raises:
        InputError: If the file is not a `.npz` archive, is truncated or damaged, or holds pickled objects.
    """
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is not an .npz archive, or it is truncated")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise InputError(f"{path} is damaged and cannot be read ({error})") from None
    except ValueError as error:
        raise InputError(f"{path} holds something other than plain arrays, which is never loaded ({error})") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the parameters in a `.safetensors`, `.pt`, `.pth` or `.bin` file, onto the CPU.

    Training checkpoints are unwrapped: the parameters may be stored under `model`, `state_dict`, `model_state_dict` or
    `teacher`, and their names may begin with `module.` or `backbone.` (only those with the prefix are then returned).

    Raises:
        InputError: If the file is missing, truncated or damaged, can only be read by running code, or holds no parameters.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    return _unwrap(_load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path), path)


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Read the parameters of a folder as transformers and timm write it: in one file, or in shards listed by an index.

    Raises:
        InputError: If the folder holds no weights, or a shard is missing.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return read_tensors(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(read_json(index).get("weight_map", {}).values()))
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing or not shards:
                raise InputError(f"{index} lists {', '.join(missing) or 'no files'}, not found in {folder}")
            return {name: tensor for shard in shards for name, tensor in read_tensors(folder / shard).items()}
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
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__} instead of an object")
    return content


def _load_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a complete safetensors file ({error})") from None


def _load_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # torch names the class or function that the file would call.
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden is None and "Unsupported" not in str(error):
            raise InputError(f"{path} is not a PyTorch checkpoint, or it is damaged") from None
        raise InputError(
            f"{path} cannot be read without running pickled code{f' ({forbidden[1]})' if forbidden else ''}, which is never "
            "done because it could do anything; save only the model's state_dict(), preferably as .safetensors"
        ) from None
    except Exception as error:  # arbitrary bytes make the unpickler raise almost anything: KeyError, EOFError, RuntimeError
        first_sentence = str(error).partition("\n")[0].partition(". ")[0]
        raise InputError(
            f"{path} is not a PyTorch checkpoint, or it is truncated ({first_sentence or type(error).__name__})"
        ) from None


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """Find the state dict inside a training checkpoint, and strip the prefixes of its names."""
    while isinstance(content, Mapping):  # wrappers can be nested
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path} holds no named parameters; save the model's state_dict()")
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return state
