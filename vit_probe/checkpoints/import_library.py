"""Importing an optional library, and parts of error messages about libraries and their models."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from vit_probe.errors import InputError

__all__ = ["import_error", "import_library", "one_line", "suggest_similar"]

_MAX_LENGTH = 400  # characters


def import_library(name: str, needed_for: str) -> Any:
    """Import an optional library. Its name is also that of the extra that installs it (`pip install 'vit-probe[timm]'`).

    Args:
        name: `timm`, `transformers`, `torchvision` or `open_clip`.
        needed_for: What needs the library; the error message begins with it.

    Raises:
        InputError: If the library is not installed or cannot be imported.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise InputError(f"{needed_for} needs the package {name}: pip install 'vit-probe[{name}]'") from None
        cause: Exception = error
    except Exception as error:  # for example the RuntimeError of a torchvision that was built for another torch
        cause = error
    raise import_error(name, needed_for, cause)


def import_error(name: str, needed_for: str, error: BaseException) -> InputError:
    """Return the InputError for a library that is installed but cannot be imported."""
    while error.__cause__ is not None:
        error = error.__cause__
    return InputError(
        f"{needed_for} needs the package {name}, which is installed but cannot be imported ({one_line(error)}); "
        "torch and torchvision must come from the same index"
    )


def suggest_similar(name: str, names: Iterable[str]) -> str:
    """Return the end of an error message that lists those of `names` which resemble `name`; empty if none does.

    Examples:
        >>> suggest_similar("vit_b_61", ["resnet18", "vit_b_16", "vit_b_32"])
        '; similar names are vit_b_16, vit_b_32'
        >>> suggest_similar("gpt", ["resnet18"])
        ''
    """
    names = list(names)
    completions = [other for other in names if name and other.startswith(name)]
    close = (completions or get_close_matches(name, names))[:5]
    return f"; similar names are {', '.join(close)}" if close else ""


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line of at most 400 characters, or its type if it has no message.

    Examples:
        >>> one_line(ValueError("two\\n  lines"))
        'two lines'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]} ..."
