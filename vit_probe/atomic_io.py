"""Writing files so that a reader sees either the old content or the new, and folders so that runs do not mix."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from vit_probe.errors import InputError

__all__ = ["locked_folder", "writable_folder", "write_bytes"]


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
        reason = error.strerror or error
        raise InputError(f"cannot write {path}: {reason}; choose a folder that exists and is writable") from None
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
        raise InputError(f"cannot use {path} as an output folder: {error.strerror or error}; choose another") from None
    return path


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Context manager in which no other process can be that has locked the same folder.

    The operating system releases the lock when the process ends, however it ends. On a file system without locks, such as some
    network drives, nothing is locked.

    Raises:
        InputError: If another process has locked the folder.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, locked_folder(Path(folder)):
        ...     with locked_folder(Path(folder)):
        ...         pass
        Traceback (most recent call last):
        vit_probe.errors.InputError: another run writes into ...; wait until it has ended, or choose another folder
    """
    from filelock import FileLock, Timeout  # slow

    file = path / ".vit-probe.lock"
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"another run writes into {path}; wait until it has ended, or choose another folder") from None
    except (OSError, NotImplementedError):  # the file system has no locks
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):  # Windows deletes the file at its release
            file.unlink()
        lock.release()
