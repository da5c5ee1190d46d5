"""How far a run has come, in one small file, so that it can go on after any interruption."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vit_probe.atomic_io import write_bytes
from vit_probe.errors import InputError

__all__ = ["RunState", "differing", "read_state", "state_file", "write_state"]

_FILE = re.compile(r"run-state(?:-\d+-of-(\d+))?\.safetensors")


@dataclass(frozen=True)
class RunState:
    """What a run has done so far.

    Args:
        images: What the stream of images keeps of those it has gone through.
        measures: What each measure has added up.
        max_batch_size: How many images memory holds, where it did not hold a batch.
    """

    images: dict[str, Any]
    measures: list[dict[str, Any]]
    max_batch_size: int | None = None


def state_file(folder: Path, rank: int, count: int, *, resume: bool) -> Path:
    """Where one of `count` processes keeps its state in `folder`; what earlier runs left there is removed, unless to go on.

    Raises:
        InputError: If it is to go on with a run of another number of processes.
    """
    for found in (match for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))):
        earlier = int(found[1] or 1)
        if not resume:
            (folder / found[0]).unlink(missing_ok=True)
        elif earlier != count:
            raise InputError(
                f"{folder} holds the state of a run in {_processes(earlier)}, and this one is in {_processes(count)}; go on "
                f"in {_processes(earlier)}, or start without --resume"
            )
    return folder / ("run-state.safetensors" if count == 1 else f"run-state-{rank}-of-{count}.safetensors")


def write_state(path: Path, identity: Mapping[str, Any], state: RunState) -> Path:
    """Writes the state, whole or not at all: arrays as safetensors, the rest as its metadata.

    Args:
        path: Where to.
        identity: What the run is of, by name: its model, images and options.
        state: How far it has come.
    """
    arrays: dict[str, np.ndarray] = {}
    plain: list[dict[str, Any]] = []
    for index, values in enumerate(state.measures):
        found = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        arrays |= {f"{index}/{name}": np.ascontiguousarray(value) for name, value in found.items()}
        plain.append({name: value for name, value in values.items() if name not in found})
    content = {
        "identity": _as_json(identity),
        "images": state.images,
        "measures": plain,
        "max_batch_size": state.max_batch_size,
    }
    return write_bytes(path, save(arrays, metadata={"vit_probe_state": json.dumps(content)}))


def read_state(path: Path, identity: Mapping[str, Any]) -> RunState | None:
    """Reads what `write_state` wrote; None if there is no such file.

    Raises:
        InputError: If the file is no state, or that of a run of another model, other images or other options.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        content = json.loads(metadata["vit_probe_state"])
    except (SafetensorError, KeyError):
        raise InputError(f"{path} is no state of a run; delete it, or start without going on") from None
    if names := differing(identity, content["identity"]):
        raise InputError(
            f"{path} is the state of another run, which differs in its {names}; to go on with it, give what it "
            "was started with, or start without going on"
        )
    measures = [dict(plain) for plain in content["measures"]]
    for name, array in arrays.items():
        index, _, field = name.partition("/")
        measures[int(index)][field] = array
    return RunState(content["images"], measures, content.get("max_batch_size"))


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What the runs of two identities differ in, in words; empty if in nothing."""
    theirs = _as_json(other)
    return _listed([name for name, value in _as_json(one).items() if theirs.get(name) != value])


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON will give it back, so that what is equal compares equal."""
    return dict(json.loads(json.dumps(values, default=str)))


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def _processes(count: int) -> str:
    return "one process" if count == 1 else f"{count} processes"
