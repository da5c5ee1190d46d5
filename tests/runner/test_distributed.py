"""Several processes share the images: the numbers are those of one, and no process waits in vain for another."""

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
from vit_probe import InputError, Preprocessing, TokenGrid, load_result, save_model
from vit_probe.data.manifest import ImageManifest
from vit_probe.data.stream import ImageStream
from vit_probe.measures import AttentionDistance, AttentionRollout
from vit_probe.results import Result
from vit_probe.runner.distributed import Processes
from vit_probe.runner.resume import state_file
from vit_probe.runner.run import AttentionRun

GRID = TokenGrid(2, 3, (8, 6), 1, True)
WAIT = 120  # seconds; a run takes a few
# Each process leaves its number, by which a test ends it.
SCRIPT = """
import os, pathlib, sys
import torch
torch.set_num_threads(1)
pathlib.Path(os.environ["PIDS"], os.environ.get("RANK", "0")).write_text(str(os.getpid()))
from vit_probe.cli.commands import main
main()
"""


@dataclass
class Ended:
    """How a process ended: exit status, standard output and standard error."""

    code: int
    out: str
    err: str


def start(folder: Path, *command: object, **environment: object) -> subprocess.Popen[str]:
    """A process whose environment says of others what `environment` says, and nothing else."""
    inherited = {
        name: value for name, value in os.environ.items() if not re.match("RANK|WORLD_|LOCAL_|MASTER_|TORCHELASTIC", name)
    }
    said = {name: str(value) for name, value in environment.items()}
    return subprocess.Popen(
        [str(part) for part in command],
        env=inherited | said | {"PIDS": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def by_hand(folder: Path, shares: list[list[object]]) -> list[subprocess.Popen[str]]:
    """A process for each entry, which are its arguments, started one by one."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    others = dict(WORLD_SIZE=len(shares), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [start(folder, sys.executable, "-c", SCRIPT, *given, RANK=rank, **others) for rank, given in enumerate(shares)]


def torchrun(folder: Path, count: int, *arguments: object, before: str = "") -> subprocess.Popen[str]:
    (folder / "script.py").write_text(before + SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    return start(folder, *launcher, folder / "script.py", *arguments)


def ends(*processes: subprocess.Popen[str]) -> list[Ended]:
    """All have ended within `WAIT` seconds."""
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=WAIT)
            found.append(Ended(process.returncode, out, "\n".join(line for line in err.splitlines() if "[W" not in line)))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return found


def waits_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def agree(one: Path, other: Path, name: str) -> Result:
    """Asserts that two folders hold the same result: maps, pictures and provenance alike, float64 within rounding."""
    mine, theirs = (load_result(folder / f"{name}.safetensors") for folder in (one, other))
    assert mine.provenance == theirs.provenance
    for field, value in vars(theirs).items():
        if not isinstance(value, np.ndarray):
            assert getattr(mine, field) == value
        elif value.dtype == np.uint8:
            np.testing.assert_array_equal(getattr(mine, field), value)
        else:
            rtol, atol = (1e-9, 1e-9) if value.dtype == np.float64 else (0, 1e-7)
            np.testing.assert_allclose(getattr(mine, field), value, rtol=rtol, atol=atol)
    return theirs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = classifier(depth=2)
    model.preprocessing = Preprocessing(size=(32, 32), resize=36)
    return save_model(model, tmp_path_factory.mktemp("model") / "small.safetensors")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Nine, of which 03 and 06 are cut off: the second of three processes has one of them, and the first the other."""
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


def test_two_processes_give_what_one_gives(checkpoint: Path, photographs: Path, tmp_path: Path) -> None:
    given = ["figures", "--model", checkpoint, "--images", photographs, "--batch-size", 1, "--on-error", "skip", "--out"]
    one, two = tmp_path / "one", tmp_path / "two"
    alone, several = ends(start(tmp_path, sys.executable, "-c", SCRIPT, *given, one), torchrun(tmp_path, 2, *given, two))
    assert (alone.code, several.code) == (0, 0), several.err
    for name in ("attention_distance", "patch_filters", "position_similarity"):
        agree(two, one, name)
    rollout: Any = agree(two, one, "rollout")
    assert rollout.names == [f"{index:02}.jpg" for index in range(9) if index not in (3, 6)]
    assert len(rollout.maps) == len(rollout.images) == 7
    assert abs(np.diff(rollout.maps, axis=0)).max(axis=(1, 2)).min() > 1e-4  # images differ, so that their order shows
    assert list(rollout.provenance["images"]["skipped"]) == ["03.jpg", "06.jpg"]
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    assert several.out.replace(str(two), str(one)) == alone.out
    assert re.findall(r"note: (\d+.jpg) is left out", several.err) == ["03.jpg", "06.jpg"]


def test_more_processes_than_images(checkpoint: Path, photographs: Path, tmp_path: Path) -> None:
    given = ["rollout", "--model", checkpoint, "--images", photographs, "--limit", 2, "--out"]
    three = by_hand(tmp_path, [[*given, tmp_path / "three"]] * 3)
    ended = ends(*three, start(tmp_path, sys.executable, "-c", SCRIPT, *given, tmp_path / "one"))
    assert [process.code for process in ended] == [0] * 4, ended
    assert [process.err for process in ended] == [""] * 4
    assert [bool(process.out) for process in ended] == [True, False, False, True]
    agree(tmp_path / "three", tmp_path / "one", "rollout")


def test_a_process_is_killed(tmp_path: Path) -> None:
    """By hand, so that nothing but the broken connection tells the others."""
    out = tmp_path / "out"
    given = ["distance", "--limit", 128, "--batch-size", 2, "--resume", "--out"]
    states = [out / f"run-state-{rank}-of-2.safetensors" for rank in (0, 1)]
    for killed in (1, 0):
        written = [path.stat().st_mtime_ns if path.exists() else 0 for path in states]
        both = by_hand(tmp_path, [[*given, out]] * 2)
        waits_for(lambda: states[killed].exists() and states[killed].stat().st_mtime_ns > written[killed])  # noqa: B023
        both[killed].send_signal(signal.SIGKILL)
        ended = ends(*both)
        assert ended[killed].code == -signal.SIGKILL
        assert ended[1 - killed].code == 2
        sentence = f"process {killed} of 2 (counted from 0) has ended before its time; the same command with --resume goes on"
        assert ended[1 - killed].err.startswith(f"vit-probe: {sentence}")
        assert len(ended[1 - killed].err.splitlines()) == 1
        assert all(path.exists() for path in states)
        assert not list(out.glob("*.csv"))
    (alone,) = ends(start(tmp_path, sys.executable, "-c", SCRIPT, *given, out))
    assert alone.code == 2
    assert "holds the state of a run in 2 processes, and this one is in one process; go on in 2 processes" in alone.err
    ended = ends(*by_hand(tmp_path, [[*given, out]] * 2))
    assert [process.code for process in ended] == [0, 0], ended
    ends(start(tmp_path, sys.executable, "-c", SCRIPT, *given, tmp_path / "whole"))
    agree(out, tmp_path / "whole", "attention_distance")
    assert not any(path.exists() for path in states)


def test_a_process_is_killed_under_torchrun(tmp_path: Path) -> None:
    out, state = tmp_path / "out", tmp_path / "out" / "run-state-1-of-2.safetensors"
    given = ["distance", "--limit", 128, "--batch-size", 2, "--out", out]
    both = torchrun(tmp_path, 2, *given)
    waits_for(state.exists)
    os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
    (ended,) = ends(both)
    assert ended.code not in (0, None)
    assert "the same command with --resume goes on" in ended.err
    assert state.exists()
    (ended,) = ends(torchrun(tmp_path, 2, *given, "--resume"))
    assert ended.code == 0, ended.err
    assert not state.exists()
    result: Any = load_result(out / "attention_distance.safetensors")
    assert result.num_images == len(set(result.provenance["images"]["names"])) == 128


@pytest.mark.parametrize("wrong", ["option", "model", "no image"])
def test_what_is_wrong_for_all_is_said_once(wrong: str, checkpoint: Path, photographs: Path, tmp_path: Path) -> None:
    given, sentence = {
        "option": (["--prefix", "neither"], "'neither' is not one of 'renormalize', 'drop'"),
        "model": (["--model", "nowhere.pt"], "there is no checkpoint file or folder nowhere.pt"),
        "no image": (["--model", checkpoint, "--images", photographs], "09.jpg is not an image that can be read"),
    }[wrong]
    (photographs / "09.jpg").write_text("no image")  # which the second process alone meets
    first, second = ends(*by_hand(tmp_path, [["distance", *given, "--out", tmp_path / "out"]] * 2))
    assert (first.code, second.code) == (2, 2)
    assert first.err.startswith("vit-probe: ")
    assert sentence in first.err
    assert len(first.err.splitlines()) == 1
    assert second.err == ""


def test_the_first_process_speaks_before_torchrun_ends_it(tmp_path: Path) -> None:
    """Which it does as soon as another has failed, and here the others are faster."""
    slow = """
import os, time
from vit_probe.cli import console as terminal
run = terminal._run
terminal._run = lambda *given: (time.sleep(2 if os.environ["RANK"] == "0" else 0), run(*given))[1]
"""
    (ended,) = ends(torchrun(tmp_path, 3, "distance", "--prefix", "neither", before=slow))
    assert ended.code not in (0, None)
    assert ended.err.count("vit-probe: ") == ended.err.count("'neither' is not one of 'renormalize', 'drop'") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_wrong_for_one_alone_ends_all(rank: int, tmp_path: Path) -> None:
    given: list[list[object]] = [["distance", "--out", tmp_path / "out"] for _ in range(2)]
    given[rank] += ["--prefix", "neither"]
    first, second = ends(*by_hand(tmp_path, given))
    assert (first.code, second.code) == (2, 2)
    assert first.err.count("vit-probe: ") == first.err.count("'neither' is not one of 'renormalize', 'drop'") == 1
    assert second.err == ""


@pytest.mark.parametrize("command", ["--help", "models", "filters", "positions"])
def test_what_takes_no_images_waits_for_nobody(command: str, tmp_path: Path) -> None:
    given = [command] if command in ("--help", "models") else [command, "--out", tmp_path / "out"]
    (ended,) = ends(start(tmp_path, sys.executable, "-c", SCRIPT, *given, RANK=0, WORLD_SIZE=2))
    assert ended.code == 0, ended.err
    assert ended.out


def test_wrong_arguments_with_nobody_to_meet(tmp_path: Path) -> None:
    (ended,) = ends(start(tmp_path, sys.executable, "-c", SCRIPT, "distance", "--prefix", "neither", RANK=1, WORLD_SIZE=2))
    assert ended.code == 2
    assert "vit-probe: in process 1 of 2: " in ended.err
    assert "'neither' is not one of 'renormalize', 'drop'" in ended.err


def test_what_one_process_meets_on_its_way_ends_all(checkpoint: Path, photographs: Path, tmp_path: Path) -> None:
    (photographs / "06.jpg").unlink()
    given = ["distance", "--model", checkpoint, "--images", photographs, "--out", tmp_path / "out"]
    first, second = ends(*by_hand(tmp_path, [given] * 2))
    assert (first.code, second.code) == (2, 2)
    assert re.match("vit-probe: in process 1 of 2: .*03.jpg cannot be decoded", second.err)
    assert "process 1 of 2 (counted from 0) has ended" in first.err


def test_processes_that_were_not_given_the_same(checkpoint: Path, photographs: Path, tmp_path: Path) -> None:
    given = ["distance", "--model", checkpoint, "--on-error", "skip", "--out", tmp_path / "out", "--images", photographs]
    first, second = ends(*by_hand(tmp_path, [given, [*given, "--limit", 8, "--prefix", "drop", "--on-error", "stop"]]))
    assert (first.code, second.code) == (2, 2)
    assert "process 1 does not have the same images, measures and on_error as process 0; start all" in first.err
    assert second.err == ""


# Merging


@settings(max_examples=30, deadline=None)
@given(
    shards=st.lists(st.integers(0, 3), min_size=7, max_size=7),
    ranks=st.permutations(range(4)),
    kind=st.sampled_from([AttentionDistance, AttentionRollout]),
)
def test_any_shards_in_any_order_give_the_whole(shards: list[int], ranks: list[int], kind: type) -> None:
    """Each image goes to a shard; the shards, some of them empty, are merged in the order of `ranks`."""
    double = torch.float64
    attention = random_attention(GRID, batch=7)
    whole = feed(kind(GRID), attention, dtype=double).compute()
    shares = [[image for image in range(7) if shards[image] == rank] for rank in ranks]
    merged, records = kind(GRID), ImageManifest()
    for share in shares:
        shard, restored = feed(kind(GRID), attention[:, share], batch_size=2, dtype=double), kind(GRID)
        restored.restore(shard.state())
        merged.merge(restored)
        records.add(ImageManifest(7, [f"image {image}" for image in share], share, [str(image) for image in share]))
    record, order = records.in_order()
    assert record.indices == list(range(7))
    assert record.names == [f"image {image}" for image in range(7)]
    assert record.digests == list("0123456")
    if kind is AttentionRollout:
        merged.reorder(order)
    result = merged.compute()
    for name, value in vars(whole).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_allclose(getattr(result, name), value, rtol=1e-9, atol=1e-12)
        elif name != "provenance":
            assert getattr(result, name) == value


def test_what_was_left_out_comes_in_the_order_of_the_list() -> None:
    records = ImageManifest()
    records.add(ImageManifest(5, ["a", "c"], [0, 2], ["x", "z"], [("e", "broken")], [4], {0: np.zeros((1, 1, 3))}))
    records.add(ImageManifest(4, ["d"], [3], ["w"], [("b", "gone")], [1], {3: np.ones((1, 1, 3))}))
    record, order = records.in_order()
    assert (record.names, record.skipped, order) == (["a", "c", "d"], [("b", "gone"), ("e", "broken")], [0, 1, 2])
    assert list(record.provenance()["skipped"]) == ["b", "e"]
    assert record.shown(2) is None  # the picture of c was not kept
    assert np.ravel(record.shown(1)).tolist() == [0, 0, 0]


def test_the_first_process_keeps_no_more_pictures_than_it_shows() -> None:
    stream = ImageStream(images(batch=4), None, keep=2, shard=(0, 2))
    shards = [[0, 2], [1, 3]]
    pictures = [{index: np.full((1, 1, 3), index) for index in shard} for shard in shards]
    records = [
        ImageManifest(4, list("ab"), shard, list("xy"), [], [], kept) for shard, kept in zip(shards, pictures, strict=True)
    ]
    stream.merge(records)
    assert stream.record().pictures.keys() == {0, 1}
    assert stream.kept()[:, 0, 0, 0].tolist() == [0, 1]  # type: ignore[index]


def test_a_state_stays_as_it_was_taken() -> None:
    record = ImageManifest(1, ["a"], [0], ["x"])
    state = record.state()
    record.add(ImageManifest(2, ["b"], [1], ["y"]))
    assert (state["position"], state["names"], state["indices"]) == (1, ["a"], [0])


# The parts


def test_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    here = Processes.from_env()
    assert (here.rank, here.count, here.is_main) == (0, 1, True)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    here = Processes.from_env()
    assert (here.rank, here.count, here.local_rank, here.is_main) == (3, 4, 1, False)
    for name, value in {"RANK": "4", "WORLD_SIZE": "four"}.items():
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            with pytest.raises(InputError, match=f"the environment says .*{name}={value}.*, which is no process of several"):
                Processes.from_env()


def test_one_process_has_nobody_to_talk_to() -> None:
    one = Processes()
    one.meet()
    assert not distributed.is_initialized()
    assert (one.gather(3), one.broadcast(4)) == ([3], 4)
    with pytest.raises(InputError, match="as it is") as caught, one.barrier():
        raise InputError("as it is")
    assert type(caught.value) is InputError


def test_nobody_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    sentence = "the other processes cannot be met .*MASTER_ADDR.* start all 2 with torchrun, or give each"
    with pytest.raises(InputError, match=sentence), Processes(0, 2).barrier():
        raise AssertionError
    assert not distributed.is_initialized()


def test_they_meet_in_the_memory_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """And all are there, within minutes, before the group is made that waits for days."""
    done: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("init_process_group", "barrier", "new_group"):
        monkeypatch.setattr(distributed, name, lambda *given, name=name, **limits: done.append((name, *given)))
    Processes(0, 2).meet()
    assert done == [("init_process_group", "gloo"), ("barrier",), ("new_group",)]


def test_a_gpu_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [Processes(9, 16, local).device("auto") for local in (0, 3, 5)] == ["cuda:0", "cuda:3", "cuda:1"]
    assert [Processes(9, 16, 2).device(name) for name in ("cuda", "cpu", "cuda:1")] == ["cuda:2", "cpu", "cuda:1"]
    assert Processes().device("auto") == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Processes(1, 2, 1).device("auto") == "auto"


def test_observers_that_cannot_be_merged() -> None:
    run = AttentionRun(small_vit(), images(), device="cpu", processes=Processes(0, 2))
    with pytest.raises(InputError, match="has no state, and is in one process"):
        run.observe(Assemble())


def test_states_of_another_number_of_processes(tmp_path: Path) -> None:
    assert state_file(tmp_path, 0, 1, resume=True).name == "run-state.safetensors"
    path = state_file(tmp_path, 1, 3, resume=True)
    assert path.name == "run-state-1-of-3.safetensors"
    path.touch()
    assert state_file(tmp_path, 0, 3, resume=True).name == "run-state-0-of-3.safetensors"
    with pytest.raises(InputError, match="in 3 processes, and this one is in 2 processes; go on in 3 processes, or start"):
        state_file(tmp_path, 1, 2, resume=True)
    with pytest.raises(InputError, match="and this one is in one process;"):
        state_file(tmp_path, 0, 1, resume=True)
    (tmp_path / "other.safetensors").touch()
    state_file(tmp_path, 0, 1, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]
