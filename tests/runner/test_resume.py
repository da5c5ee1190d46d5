"""The state of a run: what was written comes back, and only to the run that it is of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.measures.tiles import feed, random_attention
from vit_probe import InputError, TokenGrid
from vit_probe.measures import AttentionDistance, AttentionEntropy, AttentionRollout
from vit_probe.runner.protocol import Measure
from vit_probe.runner.resume import RunState, read_state, write_state

GRID = TokenGrid(2, 3, (8, 6), 1, True)
IDENTITY = {"model": "abc", "images": "def", "options": [{"prefix": "drop"}, {"size": (2, 3)}]}


@pytest.mark.parametrize("kind", [AttentionDistance, AttentionEntropy, AttentionRollout])
def test_a_measure_goes_on_where_its_state_was_taken(kind: type, tmp_path: Path) -> None:
    attention = random_attention(GRID, batch=7)
    whole, first, second = kind(GRID), kind(GRID), kind(GRID)
    assert isinstance(whole, Measure)
    for part in (attention[:, :3], attention[:, 3:]):
        feed(whole, part)
    feed(first, attention[:, :3])
    path = write_state(tmp_path / "state", IDENTITY, RunState({"names": ["a"]}, [first.state(), kind(GRID).state()]))
    state = read_state(path, IDENTITY)
    assert state is not None
    assert state.images == {"names": ["a"]}
    second.restore(state.measures[0])
    feed(second, attention[:, 3:])
    mine, theirs = second.compute(), whole.compute()
    for name, value in vars(theirs).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(mine, name), value)
    empty = kind(GRID)
    empty.restore(state.measures[1])
    with pytest.raises(InputError, match="no attention has been measured yet"):
        empty.compute()


@pytest.mark.parametrize("kind", [AttentionDistance, AttentionEntropy, AttentionRollout])
def test_a_batch_is_taken_back(kind: type) -> None:
    attention = random_attention(GRID, batch=6)
    measure, expected = kind(GRID), kind(GRID)
    for target in (measure, expected):
        target.begin_batch()
        feed(target, attention[:, :2])
    measure.begin_batch()
    feed(measure, attention[:1, 2:])  # breaks off after the first layer
    measure.roll_back()
    for target in (measure, expected):
        target.begin_batch()
        feed(target, attention[:, 2:])
    mine, theirs = measure.compute(), expected.compute()
    for name, value in vars(theirs).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(mine, name), value)


def test_no_state_yet(tmp_path: Path) -> None:
    assert read_state(tmp_path / "state", IDENTITY) is None


@pytest.mark.parametrize(
    ("changed", "listed"),
    [({"model": "xyz"}, "its model;"), ({"images": "x", "options": []}, "its images and options;")],
)
def test_the_state_of_another_run(changed: dict, listed: str, tmp_path: Path) -> None:
    path = write_state(tmp_path / "state", IDENTITY, RunState({}, []))
    with pytest.raises(InputError, match=f"is the state of another run, which differs in {listed} to go on with it, give"):
        read_state(path, IDENTITY | changed)


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_files_that_are_no_state(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "state"
    if content is None:
        from safetensors.numpy import save_file

        save_file({"a": np.zeros(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match="is no state of a run; delete it"):
        read_state(path, IDENTITY)
