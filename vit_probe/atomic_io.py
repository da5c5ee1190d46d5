"""Writing files so that a reader never meets half of one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from vit_probe.errors import InputError

__all__ = ["writable_folder", "write_bytes"]


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Writes `content` beside `path` first and then puts it in place at once.

    Raises:
        InputError: If the folder does not exist or cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise InputError(f"cannot write {path}: {error.strerror}; choose a folder that exists and can be written") from None
    return path


def writable_folder(path: str | Path) -> Path:
    """Makes the folder if need be and makes sure that files can be written into it.

    Raises:
        InputError: If it cannot be made or written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"cannot write into {path} as a folder: {error.strerror}; choose another") from None
    return path
