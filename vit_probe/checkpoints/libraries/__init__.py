"""Models that stay the library's own, where `VisionTransformer` does not cover them: one module a library."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from torch import nn

from vit_probe.checkpoints.checkpoint import check_finite
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.errors import AssumptionWarning, InputError

__all__ = ["adopt", "broken", "exact_resize", "import_library", "reason", "refuse_overrides", "similar"]

_LONGEST_REASON = 400  # characters


def import_library(name: str, wanted: str) -> Any:
    """The module of a library, which is also the name of our extra that installs it.

    Args:
        name: `timm`, `transformers`, `torchvision` or `open_clip`.
        wanted: What it is needed for, as the beginning of an error's sentence.

    Raises:
        InputError: If it is not installed, or cannot be imported.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise InputError(f"{wanted} needs the package {name}: pip install 'vit-probe[{name}]'") from None
        problem: Exception = error
    except Exception as error:  # a torchvision that was built for another torch raises a RuntimeError, for one
        problem = error
    raise InputError(broken(name, wanted, problem))


def broken(name: str, wanted: str, error: BaseException) -> str:
    """An error's sentence for a library that is there, but does not import."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (
        f"{wanted} needs the package {name}, which is installed but cannot be imported ({reason(error)}); "
        "torch and torchvision must come from the same index"
    )


def adopt(model: nn.Module, preprocessing: Preprocessing | None) -> nn.Module:
    """The library's model in evaluation mode, carrying its `preprocessing`.

    Raises:
        InputError: If a parameter holds NaN or infinity.
    """
    check_finite(model.named_parameters())
    model.preprocessing = preprocessing  # type: ignore[assignment]
    return model.eval()


def exact_resize(size: tuple[int, int], **others: Any) -> Preprocessing:
    """In place of a resize with margins, which `Preprocessing` cannot express, one without; warns that they differ."""
    warnings.warn(
        "this model's own preprocessing keeps a photograph's proportions and fills the rest of the frame; here the photograph "
        f"is resized to exactly {size[0]} x {size[1]} pixels instead (from Python, set model.preprocessing, or pass tensors)",
        AssumptionWarning,
        stacklevel=2,
    )
    return Preprocessing(size, size, **others)


def refuse_overrides(overrides: Mapping[str, Any], why: str) -> None:
    """Raise InputError, beginning with `why`, if there are fields of `ViTConfig` for a model that takes none."""
    if overrides:
        raise InputError(f"{why}; a library's model takes no fields of ViTConfig, leave out {', '.join(overrides)}")


def similar(name: str, names: Iterable[str]) -> str:
    """The end of an error's sentence: which of `names` resemble the one that is not there; empty if none does."""
    names = list(names)
    longer = [other for other in names if name and other.startswith(name)]
    close = (longer or get_close_matches(name, names))[:5]
    return f"; similar names are {', '.join(close)}" if close else ""


def reason(error: BaseException) -> str:
    """A library's exception on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..."
