"""Pickled checkpoints: their tensors are read, and nothing that they name is run."""

from __future__ import annotations

import argparse
import builtins
import os
import subprocess
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vit_probe.checkpoints.pickles import load_pickle
from vit_probe.errors import InputError

made: list[str] = []


@dataclass
class Options:
    """A class of a training program's own, which says whether its code was run."""

    learning_rate: float = 0.1

    def __setstate__(self, state: Any) -> None:
        made.append("Options")


class AttributeDict(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        made.append(key)


class Call:
    """Unpickling this calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


INERT: dict[str, Any] = {
    "options": argparse.Namespace(lr=0.1, out=Path("x"), best=np.float64(0.3), type=int, nested=argparse.Namespace(a=[1])),
    "an object of one's own": Options(),
    "a dictionary of one's own": AttributeDict(a=AttributeDict(b=Options())),
    "a class as key": {Options: {"best": 1}},
    "NumPy": [np.float32(1), np.zeros(3), np.dtype("f4"), np.random.default_rng().bit_generator.state],
    "containers": [defaultdict(list, a=[1]), deque([1, 2]), Counter("abc"), frozenset({1}), {1}, range(3), slice(1)],
    "other values": [
        datetime(2020, 1, 1),
        partial(print, 1),
        1j,
        b"bytes",
        torch.Size([1]),
        torch.device("cpu"),
        torch.float16,
    ],
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("value", INERT.values(), ids=INERT.keys())
def test_what_training_keeps_beside_tensors(value: Any, zipped: bool, tmp_path: Path) -> None:
    content = {"model": {"a": torch.arange(3.0)}, "value": value, "last": {"b": torch.ones(1)}}
    torch.save(content, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    allowed = set(torch.serialization.get_safe_globals())
    made.clear()
    read = load_pickle(tmp_path / "checkpoint.pth")
    assert set(torch.serialization.get_safe_globals()) == allowed
    torch.testing.assert_close((read["model"], read["last"]), (content["model"], content["last"]))
    assert not made


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.system, os.unlink, subprocess.call, subprocess.Popen, eval, exec, builtins.__import__])
def test_a_call_is_refused(function: Any, zipped: bool, tmp_path: Path) -> None:
    content = {"model": {"a": torch.ones(1)}, "args": Call(function, f"touch {tmp_path / 'ran'}")}
    torch.save(content, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=rf"without running pickled code \(.*{function.__name__}\), which is never done"):
        load_pickle(tmp_path / "checkpoint.pth")
    assert not (tmp_path / "ran").exists()


def test_what_the_user_allowed_stays_allowed(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "options": Options()}, tmp_path / "checkpoint.pth")
    with torch.serialization.safe_globals([Options]):
        load_pickle(tmp_path / "checkpoint.pth")
        assert Options in torch.serialization.get_safe_globals()


def test_a_pickled_model(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(
        InputError, match=r"pickled code \(torch\.nn\.modules\.linear\.Linear\).*; save only the model's state_d"
    ):
        load_pickle(tmp_path / "model.pt")
