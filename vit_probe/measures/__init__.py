"""The measures: one published idea per module.

`vit_probe.measures.token_norms` is the function of the module `token_norms.py`, and likewise for every public name of the
modules in this folder; each module is imported when one of its names is first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from vit_probe.measures.base.discovery import exports


class _Measures(ModuleType):
    """The package, in which a function goes before the module of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing `token_norms.py` binds the module to that name; the function of that name is what callers want.
        super().__setattr__(name, getattr(value, name, value) if isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Measures


def __getattr__(name: str) -> Any:
    if name not in exports():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{exports()[name]}"), name)


def __dir__() -> list[str]:
    return sorted(exports())
