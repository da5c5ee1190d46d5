"""Reading pickled checkpoints without running code: what is neither a tensor nor plain data becomes an empty stand-in."""

from __future__ import annotations

import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from vit_probe.errors import InputError

__all__ = ["load_pickle"]

# What a pickle may call, because the result is plain data. Nothing is called in fact. A call of anything else is what an attack
# looks like, so the file is refused instead of read around it.
_DATA = (
    r"(builtins\.(frozenset|range|slice)|collections|copyreg|datetime|decimal|functools\.partial|numpy|pathlib|types|uuid)\b"
)
_FILLED = {"collections.defaultdict": OrderedDict, "collections.deque": list}  # PyTorch's reader fills only exact types


class _Ignored:
    """Takes the place of what a call would return."""

    def __setstate__(self, state: Any) -> None:
        """Ignore the state."""


class _Callable(type):
    """The type of stand-ins: what happens when a pickle calls one."""

    def __call__(cls, *arguments: Any) -> Any:
        if not re.match(_DATA, cls.__name__):
            raise UnpicklingError(f"GLOBAL {cls.__name__} is called")
        return _FILLED[cls.__name__]() if cls.__name__ in _FILLED else _Ignored()


class _StandIn(metaclass=_Callable):
    """Takes the place of a class or function that a pickle names, so that none of its code runs.

    An instance becomes an empty dictionary, because PyTorch's reader fills only plain dictionaries with items.
    """

    def __new__(cls, *arguments: Any) -> Any:
        instance: OrderedDict[Any, Any] = OrderedDict()
        vars(instance)["pickled_class"] = cls.__name__
        return instance


def load_pickle(path: Path) -> Any:
    """Read what `torch.save` wrote, onto the CPU.

    Training checkpoints hold more than tensors: options (`argparse.Namespace`, configurations of other packages), paths, NumPy
    scalars, dates. Those are replaced by empty stand-ins; neither their classes nor anything else that the file names is
    imported or called. A file that calls anything else (as it does to restore an enumeration) is refused.

    Raises:
        InputError: If the file is not a checkpoint or is truncated, or if it is a pickled model or calls functions.
    """
    names = list(dict.fromkeys(_names(path)))
    admitted = {one[1] if isinstance(one, tuple) else _full_name(one) for one in torch.serialization.get_safe_globals()}
    # PyTorch prefers its own list to this one, and refuses what can never be harmless (the module os).
    stand_ins: list[Any] = [(_Callable(name, (_StandIn,), {}), name) for name in names if name not in admitted] + [_Ignored]
    forbidden = None
    try:
        # Given a path, torch.load would go by its ending.
        with path.open("rb") as file, torch.serialization.safe_globals(stand_ins):
            content = torch.load(file, map_location="cpu", weights_only=True)
        forbidden = getattr(content, "pickled_class", None)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))  # torch names the class or function that the file would call
        foreign = (name for name in names if not re.match(r"torch\.|collections\.OrderedDict", name))
        forbidden = named[1] if named else next(foreign, None)
        if forbidden is None:
            raise InputError(f"{path} is not a PyTorch checkpoint, or it is damaged") from None
    except Exception as error:  # arbitrary bytes make the unpickler raise almost anything: KeyError, EOFError, RuntimeError
        first_sentence = str(error).partition("\n")[0].partition(". ")[0]
        raise InputError(
            f"{path} is not a PyTorch checkpoint, or it is truncated ({first_sentence or type(error).__name__})"
        ) from None
    if forbidden is not None:
        raise InputError(
            f"{path} cannot be read without running pickled code ({forbidden}), which is never done because it could do "
            "anything; save only the model's state_dict(), preferably as .safetensors"
        )
    return content


def _names(path: Path) -> Iterator[str]:
    """Yield the classes and functions that the pickles in a file name; their instructions are read and not followed."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    if member.endswith("data.pkl"):
                        yield from _names_in(archive.read(member))
        else:
            with path.open("rb") as file:
                for _ in range(4):  # PyTorch's old format is four pickles, of which the last holds the content, and raw data
                    yield from _names_in(file)
    except Exception:  # not a checkpoint, or damaged: torch.load says so
        return


def _names_in(pickled: Any) -> Iterator[str]:
    for op, argument, _ in pickletools.genops(pickled):
        if op.name == "GLOBAL" and argument is not None:
            module, name = argument.split(" ", 1)
            # Old protocols, of which PyTorch's is one, spell modules as in Python 2.
            yield ".".join(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name)))


def _full_name(one: Any) -> str:
    return f"{one.__module__}.{one.__qualname__}"
