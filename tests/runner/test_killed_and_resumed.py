"""Runs that are interrupted and gone on with: the numbers are those of a run that never was."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.example_models import Assemble, images, small_vit
from vit_probe import InputError, Preprocessing
from vit_probe.measures import AttentionDistance, AttentionRollout
from vit_probe.runner.run import AttentionRun

PREPARE = Preprocessing(size=(24, 24), resize=28)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for index in range(11):
        Image.fromarray(random.integers(0, 256, (30 + index, 40, 3), dtype=np.uint8)).save(path / f"{index:02}.png")
    (path / "05.png").write_bytes((path / "05.png").read_bytes()[:500])  # truncated
    return path


def begun(pictures: Any, **options: Any) -> tuple[AttentionRun, list[Any]]:
    model = small_vit()
    run = AttentionRun(model, pictures, preprocessing=PREPARE, device="cpu", batch_size=2, keep_images=4, **options)
    return run, [AttentionDistance(run.grid), AttentionRollout(run.grid)]


class Interrupts:
    """Raises once so many images were told."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, count: int) -> None:
        self.after -= count
        if self.after < 0:
            raise KeyboardInterrupt


SOURCES: dict[str, Callable[[Path], Any]] = {
    "folder": lambda folder: folder,
    "tensor": lambda folder: images(batch=11),
    "generator": lambda folder: (images(batch=3, seed=seed) for seed in range(4)),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("every", [1, 2])
def test_interrupted_twice(source: str, every: int, folder: Path, tmp_path: Path) -> None:
    whole, expected = begun(SOURCES[source](folder), on_error="skip")
    whole.observe(*expected)
    state = tmp_path / "state"
    for after in (7, 9):
        run, measures = begun(SOURCES[source](folder), on_error="skip")
        with pytest.raises(KeyboardInterrupt):
            run.observe(*measures, progress=Interrupts(after), state=state, every=every)
        assert state.is_file()
    run, measures = begun(SOURCES[source](folder), on_error="skip")
    told: list[int] = []
    run.observe(*measures, progress=told.append, state=state, every=every)
    assert told[0] > 0
    assert sum(told) == len(run.images.names) == len(whole.images.names)
    for mine, theirs in zip(measures, expected, strict=True):
        one, other = mine.compute(run.provenance({})), theirs.compute(whole.provenance({}))
        assert one.provenance == other.provenance
        for name, value in vars(other).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(getattr(one, name), value)
    if source == "folder":
        np.testing.assert_array_equal(run.images.kept(), whole.images.kept())
        assert run.images.skipped == whole.images.skipped != []
    else:  # the first images cannot be had again, and no others pass for them
        assert len(whole.images.kept()) == 4
        assert run.images.kept() is None


def test_a_run_that_was_through_is_not_repeated(folder: Path, tmp_path: Path) -> None:
    first, measures = begun(folder, on_error="skip")
    first.observe(*measures, state=tmp_path / "state")
    again, measures = begun(folder, on_error="skip")
    again.model.register_forward_hook(lambda *_: pytest.fail("an image was shown again"))
    again.observe(*measures, state=tmp_path / "state")
    assert measures[0].compute().num_images == 10


def test_the_state_of_another_run_is_refused(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    run, measures = begun(images(batch=5))
    run.observe(*measures, state=state)
    other, measures = begun(images(batch=6))
    with pytest.raises(InputError, match="another run, which differs in its images;"):
        other.observe(*measures, state=state)
    run, measures = begun(images(batch=5))
    with pytest.raises(InputError, match="another run, which differs in its measures;"):
        run.observe(measures[0], state=state)
    other, measures = begun(images(batch=5))
    other.model.config = replace(other.model.config, norm_eps=1e-5)  # the weights are the same
    with pytest.raises(InputError, match="another run, which differs in its model;"):
        other.observe(*measures, state=state)
    skipping, measures = begun(images(batch=5), on_error="skip")
    skipping.observe(*measures, state=state)
    with torch.no_grad():
        run.model.norm.bias += 1
    with pytest.raises(InputError, match="another run, which differs in its model;"):
        AttentionRun(run.model, images(batch=5), preprocessing=PREPARE, device="cpu", batch_size=2).observe(
            *measures, state=state
        )
    with pytest.raises(InputError, match="observers that cannot be kept"):
        run.observe(Assemble(), state=state)


def test_killed_three_times(tmp_path: Path) -> None:
    """SIGKILL, at moments that the states written until then choose; the command then ends as an undisturbed one does."""
    arguments = ["distance", "--limit", "128", "--batch-size", "2", "--resume", "--out"]
    command = [
        sys.executable,
        "-c",
        "import torch; torch.set_num_threads(1); from vit_probe.cli.commands import main; main()",
        *arguments,
    ]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    state = killed / "run-state.safetensors"
    counts = []
    for _ in range(3):
        before = state.stat().st_mtime_ns if state.exists() else 0
        process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            if state.exists() and state.stat().st_mtime_ns > before:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        counts.append(state.stat().st_mtime_ns)
    assert sorted(set(counts)) == counts  # each got further
    for out in (killed, whole):
        subprocess.run([*command, str(out)], check=True, stdout=subprocess.DEVNULL)
    mine, theirs = (pd.read_csv(out / "attention_distance.csv") for out in (killed, whole))
    pd.testing.assert_frame_equal(mine, theirs, check_exact=True)
    assert not state.exists()
    names = [{path.name for path in out.iterdir() if not path.name.startswith(".")} for out in (killed, whole)]
    assert names[0] == names[1]
