"""The progress of a run in one small file, so that it can resume after any interruption."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from vit_probe.atomic_io import write_bytes
from vit_probe.errors import InputError

__all__ = ["RunState", "differing", "read_state", "reading", "state_file", "write_state"]

_STATE_FILE = re.compile(r"run-state(?:-\d+-of-(\d+))?\.safetensors")


@dataclass(frozen=True)
class RunState:
    """The progress of a run.

    Args:
        images: State of the stream of images; see `ImageStream.state`.
        measures: State of each measure.
        max_batch_size: Largest batch that fits in memory, if one did not; see `AdaptiveBatcher`.
    """

    images: dict[str, Any]
    measures: list[dict[str, Any]]
    max_batch_size: int | None = None


def state_file(folder: Path, rank: int, world_size: int, *, resume: bool) -> Path:
    """The path of a process's state in `folder`; without `resume`, deletes the states of earlier runs there.

    Raises:
        InputError: If the run to resume was started with another number of processes, or an earlier state cannot be deleted.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     state_file(Path(folder), rank=0, world_size=2, resume=True).name
        'run-state-0-of-2.safetensors'
    """
    for path in folder.iterdir():
        match = _STATE_FILE.fullmatch(path.name)
        if match is None:
            continue
        earlier = int(match[1] or 1)
        if not resume:
            try:
                path.unlink(missing_ok=True)  # another process may have deleted it first
            except OSError as error:
                raise InputError(f"cannot delete {path}, the state of an earlier run: {error.strerror}; delete it") from None
        elif earlier != world_size:
            raise InputError(
                f"{folder} holds the state of a run in {_processes(earlier)}, but this run is in {_processes(world_size)}; "
                f"resume in {_processes(earlier)}, or omit --resume to start again"
            )
    return folder / ("run-state.safetensors" if world_size == 1 else f"run-state-{rank}-of-{world_size}.safetensors")


def write_state(path: Path, identity: Mapping[str, Any], state: RunState) -> Path:
    """Write the state of a run atomically: arrays as safetensors, the rest and a checksum of everything in their metadata.

    Args:
        path: File to write.
        identity: What the run was started with, by name: model, images and options.
        state: Its progress.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> identity = {"model": "vit_small", "images": "photographs"}
        >>> with TemporaryDirectory() as folder:
        ...     path = write_state(Path(folder) / "state", identity, RunState({"position": 16}, measures=[]))
        ...     read_state(path, identity)
        RunState(images={'position': 16}, measures=[], max_batch_size=None)
    """
    arrays: dict[str, np.ndarray] = {}
    others: list[dict[str, Any]] = []
    for index, values in enumerate(state.measures):
        named_arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        arrays |= {f"{index}/{name}": np.ascontiguousarray(value) for name, value in named_arrays.items()}
        others.append({name: value for name, value in values.items() if name not in named_arrays})
    content = json.dumps(
        {
            "identity": _as_json(identity),
            "images": state.images,
            "measures": others,
            "max_batch_size": state.max_batch_size,
        }
    )
    return write_bytes(path, save(arrays, metadata={"vit_probe_state": content, "sha256": _checksum(content, arrays)}))


def read_state(path: Path, identity: Mapping[str, Any]) -> RunState | None:
    """Read what `write_state` wrote; None if the file does not exist.

    Raises:
        InputError: If the file is not the state of a run, is damaged, or belongs to a run of another model, other images, other
            options or other versions of the software.
    """
    with reading(path):
        if not path.exists():
            return None
        if not path.is_file():  # opening a named pipe would wait for whoever writes into it
            raise InputError(f"{path} is not the state of a run; delete it, or omit --resume (it is not a regular file)")
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        content = metadata["vit_probe_state"]
        if metadata.get("sha256") != _checksum(content, arrays):
            raise InputError(
                f"{path} does not match its checksum: it is damaged, or from another version; delete it, or omit --resume"
            )
        found = json.loads(content)
        if names := differing(identity, found["identity"]):
            raise InputError(
                f"{path} is the state of another run, which differs in its {names}; to resume that run, pass what it was "
                "started with; to start again, delete the file or omit --resume"
            )
        measures = [dict(values) for values in found["measures"]]
        for name, array in arrays.items():
            index, _, field = name.partition("/")
            measures[int(index)][field] = array
        size = found["max_batch_size"]
        if size is not None and (type(size) is not int or size < 1):
            raise TypeError(f"max_batch_size is {size!r}")
        return RunState(found["images"], measures, size)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Context manager that turns whatever a damaged or foreign file raises when it is read as a state into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} is not the state of a run; delete it, or omit --resume ({error!r})") from None


def _checksum(content: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(content.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """List the names in `one` whose values differ in `other`, as a phrase for a message; empty if all are equal.

    Of versions, the phrase gives the values, too.

    Examples:
        >>> differing({"model": 1, "images": 2, "options": 3}, {"model": 1, "images": 0, "options": 0})
        'images and options'
    """
    mine, theirs = _as_json(one), _as_json(other)
    names = [name for name, value in mine.items() if theirs.get(name) != value]
    return _join([f"{name} ({theirs.get(name)}, not {mine[name]})" if name.startswith("version") else name for name in names])


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as JSON returns them (tuples as lists, for one), so that they compare equal to those read from a file."""
    return dict(json.loads(json.dumps(values, default=str)))


def _join(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def _processes(count: int) -> str:
    return "one process" if count == 1 else f"{count} processes"
