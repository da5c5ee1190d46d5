"""The state of a run: reading returns what was written, and only to the run that wrote it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.example_models import images, small_vit
from tests.measures.tiles import feed, random_attention
from tests.runner.result_arrays import result_arrays
from vit_probe import InputError, TokenGrid, attention_entropy, mean_attention_distance
from vit_probe.measures.rollout import AttentionRollout
from vit_probe.runner import resume, run
from vit_probe.runner.protocol import Measure
from vit_probe.runner.resume import RunState, read_state, state_file, write_state
from vit_probe.runner.run import AttentionRun

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


def test_versions_belong_to_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = AttentionRun(small_vit(), images(), device="cpu")
    attention.observe(mean_attention_distance.observer(attention.grid), state=tmp_path / "state")
    versions = run.software_versions()
    monkeypatch.setattr(run, "software_versions", lambda: versions | {"torch": "2.9.1", "numpy": "1.0"})
    with pytest.raises(InputError, match=rf"its version of torch \({re.escape(versions['torch'])}, not 2.9.1\); to resume"):
        attention.observe(mean_attention_distance.observer(attention.grid), state=tmp_path / "state")


@pytest.mark.parametrize("content", [b"", b"nonsense", None, "folder"])
def test_files_that_are_not_a_state(content: bytes | str | None, tmp_path: Path) -> None:
    path = tmp_path / "state"
    if content is None:
        save_file({"a": np.zeros(2)}, path)
    elif isinstance(content, str):
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match="is not the state of a run; delete it, or omit --resume"):
        read_state(path, IDENTITY)


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("there are no named pipes here")
    os.mkfifo(tmp_path / "state")
    with pytest.raises(InputError, match=r"state is not the state of a run; .* \(it is not a regular file\)"):
        read_state(tmp_path / "state", IDENTITY)


def test_a_state_that_cannot_be_deleted(tmp_path: Path) -> None:
    (tmp_path / "run-state.safetensors").mkdir()
    with pytest.raises(InputError, match=r"cannot delete .*run-state.safetensors, the state of an earlier run: .*; delete it"):
        state_file(tmp_path, 0, 1, resume=False)


def a_state(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and arrays of a valid state."""
    measure = mean_attention_distance.observer(GRID)
    feed(measure, random_attention(GRID, batch=2))
    write_state(path, IDENTITY, RunState({"position": 2}, [measure.state()]))
    with safe_open(path, framework="numpy") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)


def changed(content: str, **values: Any) -> str:
    return json.dumps(json.loads(content) | values)


TAMPERED: dict[str, Callable[[str], str]] = {
    "a count": lambda content: content.replace('"position": 2', '"position": 3'),
    "no measures": lambda content: changed(content, measures=[]),
    "a batch size": lambda content: changed(content, max_batch_size=True),
    "the order of names": lambda content: json.dumps(dict(reversed(json.loads(content).items()))),
    "no JSON": lambda content: content[:-1],
}


@pytest.mark.parametrize("change", [*TAMPERED, "a number", "a type", "a shape", "an array", "no checksum"])
def test_whatever_was_changed_does_not_match_the_checksum(change: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    metadata, arrays = a_state(path)
    assert read_state(path, IDENTITY) is not None
    name = next(name for name, array in arrays.items() if array.ndim == 1 and array.dtype == np.float64)
    if change in TAMPERED:
        metadata["vit_probe_state"] = TAMPERED[change](metadata["vit_probe_state"])
    elif change == "no checksum":
        del metadata["sha256"]
    elif change == "an array":
        del arrays[name]
    else:
        arrays[name] = {
            "a number": arrays[name] + np.array([0, 1e-12]),
            "a type": arrays[name].view(np.int64),
            "a shape": arrays[name][None],
        }[change]
    save_file(arrays, path, metadata)
    with pytest.raises(InputError, match="state does not match its checksum: it is damaged, or from another version; delete"):
        read_state(path, IDENTITY)


DAMAGED = {
    "[]": [],
    "no identity": {"identity": None},
    "no images": {"images": None},
    "no list": {"measures": 3},
    "too few measures": {"measures": []},
    "numbers as measures": {"measures": [1, 2]},
    "a word as batch size": {"max_batch_size": "x"},
    "batches of no image": {"max_batch_size": 0},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_state_with_a_valid_checksum(damage: str, tmp_path: Path) -> None:
    """As another program may have written it; the error does not depend on where it shows."""
    path = tmp_path / "state"
    attention = AttentionRun(small_vit(), images(), device="cpu")
    attention.observe(mean_attention_distance.observer(attention.grid), state=path)
    with safe_open(path, framework="numpy") as file:
        content = json.loads(file.metadata()["vit_probe_state"])
    values = DAMAGED[damage]
    content = json.dumps(content | values if isinstance(values, dict) else values)
    arrays = {"0/mean": np.zeros(2)}
    save_file(arrays, path, {"vit_probe_state": content, "sha256": resume._checksum(content, arrays)})
    with pytest.raises(InputError, match="state is not the state of a run; delete it, or omit --resume"):
        attention.observe(mean_attention_distance.observer(attention.grid), state=path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda found: found["measures"][0].update(names=[["other"], ["other"]]), "is not the state of a run; delete it"),
        (lambda found: found["measures"][0].update(names=[["distance"], ["distance"]]), "is not the state of a run; delete it"),
        (lambda found: found["images"].update(position="x"), "does not number its images"),
        (lambda found: found["images"].pop("names"), "is not the state of a run; delete it"),
    ],
)
def test_parts_of_a_state_that_do_not_fit_together(change: Callable[[Any], Any], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    attention = AttentionRun(small_vit(), images(), device="cpu")
    attention.observe(mean_attention_distance.observer(attention.grid), state=path)
    with safe_open(path, framework="numpy") as file:
        content = json.loads(file.metadata()["vit_probe_state"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    change(content)
    text = json.dumps(content)
    save_file(arrays, path, {"vit_probe_state": text, "sha256": resume._checksum(text, arrays)})
    with pytest.raises(InputError, match=sentence):
        attention.observe(mean_attention_distance.observer(attention.grid), state=path)
