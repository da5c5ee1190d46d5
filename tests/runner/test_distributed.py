"""Several processes share the images: results equal those of one process, and no process waits for ever."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import distributed

from tests.example_models import Assemble, classifier, images, small_vit
from tests.measures.tiles import feed, random_attention
from tests.runner.result_arrays import result_arrays
from vit_probe import InputError, Preprocessing, TokenGrid, attention_entropy, load_result, mean_attention_distance, save_model
from vit_probe.data.manifest import ImageManifest
from vit_probe.data.stream import ImageStream
from vit_probe.measures.rollout import AttentionRollout
from vit_probe.results import Result
from vit_probe.runner.distributed import ProcessGroup
from vit_probe.runner.protocol import PerImage
from vit_probe.runner.resume import state_file
from vit_probe.runner.run import AttentionRun

GRID = TokenGrid(2, 3, (8, 6), 1, True)
TIMEOUT = 120  # seconds; a run takes a few
# Each process writes its process id to a file, so that a test can kill it.
SCRIPT = """
import os, pathlib, sys
import torch
torch.set_num_threads(1)
pathlib.Path(os.environ["PIDS"], os.environ.get("RANK", "0")).write_text(str(os.getpid()))
from vit_probe.cli.commands import main
main()
"""


@dataclass
class Completed:
    """Exit code, standard output and standard error of a process."""

    code: int
    out: str
    err: str


def start(folder: Path, *command: object, **environment: object) -> subprocess.Popen[str]:
    """Start a process with the variables of `environment`, and no other variables of torchrun."""
    inherited = {
        name: value for name, value in os.environ.items() if not re.match("RANK|WORLD_|LOCAL_|MASTER_|TORCHELASTIC", name)
    }
    variables = {name: str(value) for name, value in environment.items()}
    return subprocess.Popen(
        [str(part) for part in command],
        env=inherited | variables | {"PIDS": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_all(folder: Path, arguments_of_each: list[list[object]]) -> list[subprocess.Popen[str]]:
    """Start a group of processes without torchrun, each with its own arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = dict(WORLD_SIZE=len(arguments_of_each), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [
        start(folder, sys.executable, "-c", SCRIPT, *arguments, RANK=rank, **group)
        for rank, arguments in enumerate(arguments_of_each)
    ]


def torchrun(folder: Path, world_size: int, *arguments: object, before: str = "") -> subprocess.Popen[str]:
    (folder / "script.py").write_text(before + SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world_size]
    return start(folder, *launcher, folder / "script.py", *arguments)


def wait_for(*processes: subprocess.Popen[str]) -> list[Completed]:
    """Wait until all processes have ended; fails after `TIMEOUT` seconds."""
    completed = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=TIMEOUT)
            err = "\n".join(line for line in err.splitlines() if "[W" not in line)  # warnings of torch's C++ code
            completed.append(Completed(process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return completed


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_same_result(actual: Path, desired: Path, name: str) -> Result:
    """Assert that two folders hold the same result and provenance, numbers within rounding; returns the result."""
    result, expected = (load_result(folder / f"{name}.safetensors") for folder in (actual, desired))
    assert result.provenance == expected.provenance
    for field, value in vars(expected).items():
        if not isinstance(value, np.ndarray | dict):
            assert getattr(result, field) == value
    arrays, expected_arrays = result_arrays(result), result_arrays(expected)
    assert arrays.keys() == expected_arrays.keys()
    for name, value in expected_arrays.items():
        if value.dtype == np.uint8:
            np.testing.assert_array_equal(arrays[name], value)
        else:
            rtol, atol = (1e-9, 1e-9) if value.dtype == np.float64 else (0, 1e-7)
            np.testing.assert_allclose(arrays[name], value, rtol=rtol, atol=atol)
    return expected


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = classifier(depth=2)
    model.preprocessing = Preprocessing(size=(32, 32), resize=36)
    return save_model(model, tmp_path_factory.mktemp("model") / "small.safetensors")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Nine photographs, two of them truncated: 03 is in the shard of the second of two processes, 06 in that of the first."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(9):
        Image.fromarray(random.integers(0, 256, (40 + index, 50, 3), dtype=np.uint8)).save(
            folder / f"{index:02}.jpg", quality=95
        )
    for name in ("03.jpg", "06.jpg"):
        (folder / name).write_bytes((folder / name).read_bytes()[:1500])
    return folder


# The command


def test_two_processes_equal_one(checkpoint: Path, photographs: Path, tmp_path: Path) -> None:
    arguments = ["figures", "--model", checkpoint, "--images", photographs, "--batch-size", 1, "--on-error", "skip", "--out"]
    one, two = tmp_path / "one", tmp_path / "two"
    single, group = wait_for(
        start(tmp_path, sys.executable, "-c", SCRIPT, *arguments, one), torchrun(tmp_path, 2, *arguments, two)
    )
    assert (single.code, group.code) == (0, 0), group.err
    for name in ("attention_distance", "patch_filters", "position_similarity"):
        assert_same_result(two, one, name)
    rollout: Any = assert_same_result(two, one, "rollout")
    assert rollout.names == [f"{index:02}.jpg" for index in range(9) if index not in (3, 6)]
    assert len(rollout.maps) == len(rollout.images) == 7
    assert abs(np.diff(rollout.maps, axis=0)).max(axis=(1, 2)).min() > 1e-4  # the images differ, so a wrong order would show
    assert list(rollout.provenance["images"]["skipped"]) == ["03.jpg", "06.jpg"]
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    assert group.out.replace(str(two), str(one)) == single.out
    assert re.findall(r"note: (\d+.jpg) is left out", group.err) == ["03.jpg", "06.jpg"]


def test_more_processes_than_images(checkpoint: Path, photographs: Path, tmp_path: Path) -> None:
    arguments = ["rollout", "--model", checkpoint, "--images", photographs, "--limit", 2, "--out"]
    three = start_all(tmp_path, [[*arguments, tmp_path / "three"]] * 3)
    completed = wait_for(*three, start(tmp_path, sys.executable, "-c", SCRIPT, *arguments, tmp_path / "one"))
    assert [process.code for process in completed] == [0] * 4, completed
    assert [process.err for process in completed] == [""] * 4
    assert [bool(process.out) for process in completed] == [True, False, False, True]
    assert_same_result(tmp_path / "three", tmp_path / "one", "rollout")


def test_a_process_is_killed(tmp_path: Path) -> None:
    """Without torchrun, so that the other process learns of it only from the broken connection."""
    out = tmp_path / "out"
    arguments = ["distance", "--limit", 128, "--batch-size", 2, "--resume", "--out"]
    states = [out / f"run-state-{rank}-of-2.safetensors" for rank in (0, 1)]
    for killed in (1, 0):
        written = [path.stat().st_mtime_ns if path.exists() else 0 for path in states]
        both = start_all(tmp_path, [[*arguments, out]] * 2)
        wait_until(lambda: states[killed].exists() and states[killed].stat().st_mtime_ns > written[killed])  # noqa: B023
        both[killed].send_signal(signal.SIGKILL)
        completed = wait_for(*both)
        assert completed[killed].code == -signal.SIGKILL
        assert completed[1 - killed].code == 2
        message = f"process {killed} of 2 (counting from 0) exited before the run was complete"
        assert completed[1 - killed].err.startswith(
            f"vit-probe: {message}; the same command with --resume continues from there"
        )
        assert len(completed[1 - killed].err.splitlines()) == 1
        assert all(path.exists() for path in states)
        assert not list(out.glob("*.csv"))
    (single,) = wait_for(start(tmp_path, sys.executable, "-c", SCRIPT, *arguments, out))
    assert single.code == 2
    assert "holds the state of a run in 2 processes, but this run is in one process; resume in 2 processes" in single.err
    completed = wait_for(*start_all(tmp_path, [[*arguments, out]] * 2))
    assert [process.code for process in completed] == [0, 0], completed
    wait_for(start(tmp_path, sys.executable, "-c", SCRIPT, *arguments, tmp_path / "uninterrupted"))
    assert_same_result(out, tmp_path / "uninterrupted", "attention_distance")
    assert not any(path.exists() for path in states)


def test_a_process_is_killed_under_torchrun(tmp_path: Path) -> None:
    out, state = tmp_path / "out", tmp_path / "out" / "run-state-1-of-2.safetensors"
    arguments = ["distance", "--limit", 128, "--batch-size", 2, "--out", out]
    both = torchrun(tmp_path, 2, *arguments)
    wait_until(state.exists)
    os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
    (completed,) = wait_for(both)
    assert completed.code not in (0, None)
    assert "the same command with --resume continues" in completed.err
    assert state.exists()
    (completed,) = wait_for(torchrun(tmp_path, 2, *arguments, "--resume"))
    assert completed.code == 0, completed.err
    assert not state.exists()
    result: Any = load_result(out / "attention_distance.safetensors")
    assert result.num_images == len(set(result.provenance["images"]["names"])) == 128


@pytest.mark.parametrize("error", ["option", "model", "image"])
def test_an_error_in_all_processes_is_reported_once(error: str, checkpoint: Path, photographs: Path, tmp_path: Path) -> None:
    arguments, message = {
        "option": (["--prefix", "neither"], "'neither' is not one of 'renormalize', 'drop'"),
        "model": (["--model", "nowhere.pt"], "there is no checkpoint file or folder nowhere.pt"),
        "image": (["--model", checkpoint, "--images", photographs], "09.jpg is not a readable image file"),
    }[error]
    (photographs / "09.jpg").write_text("no image")  # in the shard of the second process only
    first, second = wait_for(*start_all(tmp_path, [["distance", *arguments, "--out", tmp_path / "out"]] * 2))
    assert (first.code, second.code) == (2, 2)
    assert first.err.startswith("vit-probe: ")
    assert message in first.err
    assert len(first.err.splitlines()) == 1
    assert second.err == ""


def test_the_main_process_reports_before_torchrun_ends_it(tmp_path: Path) -> None:
    """torchrun ends all processes as soon as one has failed, and here the others fail earlier than the main process."""
    slow = """
import os, time
from vit_probe.cli import console as terminal
run = terminal._run
terminal._run = lambda *arguments: (time.sleep(2 if os.environ["RANK"] == "0" else 0), run(*arguments))[1]
"""
    (completed,) = wait_for(torchrun(tmp_path, 3, "distance", "--prefix", "neither", before=slow))
    assert completed.code not in (0, None)
    assert completed.err.count("vit-probe: ") == completed.err.count("'neither' is not one of 'renormalize', 'drop'") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_ends_all(rank: int, tmp_path: Path) -> None:
    arguments: list[list[object]] = [["distance", "--out", tmp_path / "out"] for _ in range(2)]
    arguments[rank] += ["--prefix", "neither"]
    first, second = wait_for(*start_all(tmp_path, arguments))
    assert (first.code, second.code) == (2, 2)
    assert first.err.count("vit-probe: ") == first.err.count("'neither' is not one of 'renormalize', 'drop'") == 1
    assert second.err == ""


@pytest.mark.parametrize("command", ["--help", "models", "filters", "positions"])
def test_commands_without_images_do_not_wait_for_other_processes(command: str, tmp_path: Path) -> None:
    arguments = [command] if command in ("--help", "models") else [command, "--out", tmp_path / "out"]
    (completed,) = wait_for(start(tmp_path, sys.executable, "-c", SCRIPT, *arguments, RANK=0, WORLD_SIZE=2))
    assert completed.code == 0, completed.err
    assert completed.out


def test_wrong_arguments_without_other_processes(tmp_path: Path) -> None:
    command = (sys.executable, "-c", SCRIPT, "distance", "--prefix", "neither")
    (completed,) = wait_for(start(tmp_path, *command, RANK=1, WORLD_SIZE=2))
    assert completed.code == 2
    assert "vit-probe: in process 1 of 2: " in completed.err
    assert "'neither' is not one of 'renormalize', 'drop'" in completed.err


def test_an_error_of_one_process_during_the_run_ends_all(checkpoint: Path, photographs: Path, tmp_path: Path) -> None:
    (photographs / "06.jpg").unlink()
    arguments = ["distance", "--model", checkpoint, "--images", photographs, "--out", tmp_path / "out"]
    first, second = wait_for(*start_all(tmp_path, [arguments] * 2))
    assert (first.code, second.code) == (2, 2)
    assert re.match("vit-probe: in process 1 of 2: .*03.jpg cannot be decoded", second.err)
    assert "process 1 of 2 (counting from 0) exited before the run was complete" in first.err


def test_processes_with_different_options_raise(checkpoint: Path, photographs: Path, tmp_path: Path) -> None:
    arguments = ["distance", "--model", checkpoint, "--on-error", "skip", "--out", tmp_path / "out", "--images", photographs]
    first, second = wait_for(
        *start_all(tmp_path, [arguments, [*arguments, "--limit", 8, "--prefix", "drop", "--on-error", "stop"]])
    )
    assert (first.code, second.code) == (2, 2)
    assert "process 1 does not have the same images, measures and on_error as process 0; start all" in first.err
    assert second.err == ""


# Merging shards


@settings(max_examples=30, deadline=None)
@given(
    shards=st.lists(st.integers(0, 3), min_size=7, max_size=7),
    ranks=st.permutations(range(4)),
    observer=st.sampled_from(
        [mean_attention_distance.observer, partial(attention_entropy.observer, per_image=True), AttentionRollout]
    ),
)
def test_merging_any_shards_in_any_order_equals_one_process(shards: list[int], ranks: list[int], observer: Any) -> None:
    """Each image belongs to a shard; the shards, some of them empty, are merged in the order of `ranks`."""
    double = torch.float64
    attention = random_attention(GRID, batch=7)
    together = feed(observer(GRID), attention, dtype=double).compute()
    merged, manifests = observer(GRID), ImageManifest()
    for rank in ranks:
        shard = [image for image in range(7) if shards[image] == rank]
        measure, restored = feed(observer(GRID), attention[:, shard], batch_size=2, dtype=double), observer(GRID)
        restored.restore(measure.state())
        merged.merge(restored)
        manifests.extend(ImageManifest(7, [f"image {image}" for image in shard], shard, [str(image) for image in shard]))
    manifest, order = manifests.in_order()
    assert manifest.indices == list(range(7))
    assert manifest.names == [f"image {image}" for image in range(7)]
    assert manifest.digests == list("0123456")
    if isinstance(merged, PerImage):
        merged.reorder(order)
    result = merged.compute()
    arrays, expected = result_arrays(result), result_arrays(together)
    assert arrays.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(arrays[name], value, rtol=1e-9, atol=1e-12)
    for name, value in vars(together).items():
        if not isinstance(value, np.ndarray | dict):
            assert getattr(result, name) == value


def test_skipped_images_are_sorted_too() -> None:
    manifests = ImageManifest()
    manifests.extend(ImageManifest(5, ["a", "c"], [0, 2], ["x", "z"], [("e", "broken")], [4], {0: np.zeros((1, 1, 3))}))
    manifests.extend(ImageManifest(4, ["d"], [3], ["w"], [("b", "gone")], [1], {3: np.ones((1, 1, 3))}))
    manifest, order = manifests.in_order()
    assert (manifest.names, manifest.skipped, order) == (["a", "c", "d"], [("b", "gone"), ("e", "broken")], [0, 1, 2])
    assert list(manifest.provenance()["skipped"]) == ["b", "e"]
    assert manifest.first_pictures(2) is None  # the picture of c was not kept
    assert np.ravel(manifest.first_pictures(1)).tolist() == [0, 0, 0]


def test_merging_keeps_no_more_pictures_than_are_shown() -> None:
    stream = ImageStream(images(batch=4), None, keep=2, shard=(0, 2))
    shards = [[0, 2], [1, 3]]
    pictures = [{index: np.full((1, 1, 3), index) for index in shard} for shard in shards]
    manifests = [
        ImageManifest(4, list("ab"), shard, list("xy"), [], [], kept) for shard, kept in zip(shards, pictures, strict=True)
    ]
    stream.merge(manifests)
    assert stream.manifest.pictures.keys() == {0, 1}
    assert stream.kept()[:, 0, 0, 0].tolist() == [0, 1]  # type: ignore[index]


def test_a_state_does_not_change_with_its_manifest() -> None:
    manifest = ImageManifest(1, ["a"], [0], ["x"])
    state = manifest.state()
    manifest.extend(ImageManifest(2, ["b"], [1], ["y"]))
    assert (state["position"], state["names"], state["indices"]) == (1, ["a"], [0])


# ProcessGroup and state files


def test_from_env(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    processes = ProcessGroup.from_env()
    assert (processes.rank, processes.world_size, processes.is_main) == (0, 1, True)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    processes = ProcessGroup.from_env()
    assert (processes.rank, processes.world_size, processes.local_rank, processes.is_main) == (3, 4, 1, False)
    for name, value in {"RANK": "4", "WORLD_SIZE": "four"}.items():
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            with pytest.raises(InputError, match=f"the environment variables .*{name}={value}.* are invalid: they must be"):
                ProcessGroup.from_env()


def test_a_single_process_does_not_communicate() -> None:
    processes = ProcessGroup()
    processes.init()
    assert not distributed.is_initialized()
    assert (processes.gather(3), processes.broadcast(4)) == ([3], 4)
    with pytest.raises(InputError, match="unchanged") as caught, processes.barrier():
        raise InputError("unchanged")
    assert type(caught.value) is InputError


def test_the_other_processes_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    message = "cannot connect to the other processes .*MASTER_ADDR.* start all 2 with torchrun, or set RANK"
    with pytest.raises(InputError, match=message), ProcessGroup(0, 2).barrier():
        raise AssertionError
    assert not distributed.is_initialized()


def test_processes_connect_over_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are there, within minutes, before the group with the long timeout is made."""
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("init_process_group", "barrier", "new_group"):
        monkeypatch.setattr(distributed, name, lambda *arguments, name=name, **timeout: calls.append((name, *arguments)))
    ProcessGroup(0, 2).init()
    assert calls == [("init_process_group", "gloo"), ("barrier",), ("new_group",)]


def test_a_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [ProcessGroup(9, 16, local).device("auto") for local in (0, 3, 5)] == ["cuda:0", "cuda:3", "cuda:1"]
    assert [ProcessGroup(9, 16, 2).device(name) for name in ("cuda", "cpu", "cuda:1")] == ["cuda:2", "cpu", "cuda:1"]
    assert ProcessGroup().device("auto") == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ProcessGroup(1, 2, 1).device("auto") == "auto"


def test_observers_that_cannot_be_merged() -> None:
    run = AttentionRun(small_vit(), images(), device="cpu", processes=ProcessGroup(0, 2))
    with pytest.raises(InputError, match=r"observers without a state .* in one process only"):
        run.observe(Assemble())


def test_the_state_of_another_number_of_processes_raises(tmp_path: Path) -> None:
    assert state_file(tmp_path, 0, 1, resume=True).name == "run-state.safetensors"
    path = state_file(tmp_path, 1, 3, resume=True)
    assert path.name == "run-state-1-of-3.safetensors"
    path.touch()
    assert state_file(tmp_path, 0, 3, resume=True).name == "run-state-0-of-3.safetensors"
    with pytest.raises(InputError, match="in 3 processes, but this run is in 2 processes; resume in 3 processes, or omit"):
        state_file(tmp_path, 1, 2, resume=True)
    with pytest.raises(InputError, match="but this run is in one process;"):
        state_file(tmp_path, 0, 1, resume=True)
    (tmp_path / "other.safetensors").touch()
    state_file(tmp_path, 0, 1, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]
