"""The state of a run: reading returns what was written, and only to the run that wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.measures.tiles import feed, random_attention
from tests.runner.result_arrays import result_arrays
from vit_probe import InputError, TokenGrid, attention_entropy, mean_attention_distance
from vit_probe.measures.rollout import AttentionRollout
from vit_probe.runner.protocol import Measure
from vit_probe.runner.resume import RunState, read_state, write_state

GRID = TokenGrid(2, 3, (8, 6), 1, True)
OBSERVERS = [mean_attention_distance.observer, attention_entropy.observer, AttentionRollout]
IDENTITY = {"model": "abc", "images": "def", "options": [{"prefix": "drop"}, {"size": (2, 3)}]}


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_measure_continues_from_its_state(observer: Any, tmp_path: Path) -> None:
    attention = random_attention(GRID, batch=7)
    uninterrupted, first, second = observer(GRID), observer(GRID), observer(GRID)
    assert isinstance(uninterrupted, Measure)
    for part in (attention[:, :3], attention[:, 3:]):
        feed(uninterrupted, part)
    feed(first, attention[:, :3])
    path = write_state(tmp_path / "state", IDENTITY, RunState({"names": ["a"]}, [first.state(), observer(GRID).state()]))
    state = read_state(path, IDENTITY)
    assert state is not None
    assert state.images == {"names": ["a"]}
    second.restore(state.measures[0])
    feed(second, attention[:, 3:])
    resumed, expected = second.compute(), uninterrupted.compute()
    np.testing.assert_equal(result_arrays(resumed), result_arrays(expected))
    empty = observer(GRID)
    empty.restore(state.measures[1])
    with pytest.raises(InputError, match=r"no .+ ha(s|ve) been measured yet"):
        empty.compute()


@pytest.mark.parametrize("observer", OBSERVERS)
def test_rolling_back_a_batch(observer: Any) -> None:
    attention = random_attention(GRID, batch=6)
    rolled_back, undisturbed = observer(GRID), observer(GRID)
    for measure in (rolled_back, undisturbed):
        measure.begin_batch()
        feed(measure, attention[:, :2])
    rolled_back.begin_batch()
    feed(rolled_back, attention[:1, 2:])  # fails after the first layer
    rolled_back.roll_back()
    for measure in (rolled_back, undisturbed):
        measure.begin_batch()
        feed(measure, attention[:, 2:])
    result, expected = rolled_back.compute(), undisturbed.compute()
    np.testing.assert_equal(result_arrays(result), result_arrays(expected))


def test_no_state_file(tmp_path: Path) -> None:
    assert read_state(tmp_path / "state", IDENTITY) is None


@pytest.mark.parametrize(
    ("changed", "listed"),
    [({"model": "xyz"}, "its model;"), ({"images": "x", "options": []}, "its images and options;")],
)
def test_the_state_of_another_run(changed: dict, listed: str, tmp_path: Path) -> None:
    path = write_state(tmp_path / "state", IDENTITY, RunState({}, []))
    with pytest.raises(InputError, match=f"is the state of another run, which differs in {listed} to resume that run, pass"):
        read_state(path, IDENTITY | changed)


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_files_that_are_not_a_state(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "state"
    if content is None:
        from safetensors.numpy import save_file

        save_file({"a": np.zeros(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match="is not the state of a run; delete it, or omit --resume"):
        read_state(path, IDENTITY)
