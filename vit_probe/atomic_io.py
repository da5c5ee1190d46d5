"""Atomic writing of files: a reader sees either the old content or the new, never a part of it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from vit_probe.errors import InputError

__all__ = ["writable_folder", "write_bytes"]


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file atomically, replacing an existing one.

    Returns:
        The path of the file.

    Raises:
        InputError: If the folder does not exist or is not writable, or the disk is full.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_bytes(Path(folder) / "numbers.csv", b"1,2,3").read_text()
        '1,2,3'
    """
    path = Path(path)
    # In the same folder, because a rename is atomic only within one file system; hidden, because a killed process leaves it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise InputError(f"cannot write {path}: {error.strerror}; choose a folder that exists and is writable") from None
    return path


def writable_folder(path: str | Path) -> Path:
    """Create a folder if it does not exist, and check that files can be written into it.

    Returns:
        The path of the folder.

    Raises:
        InputError: If the folder cannot be created or is not writable.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     writable_folder(f"{folder}/results/figures").is_dir()
        True
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell about read-only file systems or access lists; writing a file does.
        with NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"cannot use {path} as an output folder: {error.strerror}; choose another") from None
    return path
