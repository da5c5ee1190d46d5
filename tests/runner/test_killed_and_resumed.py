"""Interrupted and resumed runs: their numbers equal those of an uninterrupted run."""

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
from tests.runner.result_arrays import result_arrays
from vit_probe import InputError, Preprocessing, attention_entropy, mean_attention_distance
from vit_probe.measures.rollout import AttentionRollout
from vit_probe.runner.run import AttentionRun

PREPROCESSING = Preprocessing(size=(24, 24), resize=28)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for index in range(11):
        Image.fromarray(random.integers(0, 256, (30 + index, 40, 3), dtype=np.uint8)).save(path / f"{index:02}.png")
    (path / "05.png").write_bytes((path / "05.png").read_bytes()[:500])  # truncated
    return path


def make_run(photographs: Any, **options: Any) -> tuple[AttentionRun, list[Any]]:
    model = small_vit()
    run = AttentionRun(model, photographs, preprocessing=PREPROCESSING, device="cpu", batch_size=2, keep_images=4, **options)
    entropy = attention_entropy.observer(run.grid, per_image=True)
    return run, [mean_attention_distance.observer(run.grid), entropy, AttentionRollout(run.grid)]


class Interrupts:
    """Progress callback that raises KeyboardInterrupt after more than `after` images."""

    def __init__(self, after: int) -> None:
        self.remaining = after

    def __call__(self, count: int) -> None:
        self.remaining -= count
        if self.remaining < 0:
            raise KeyboardInterrupt


SOURCES: dict[str, Callable[[Path], Any]] = {
    "folder": lambda folder: folder,
    "tensor": lambda folder: images(batch=11),
    "generator": lambda folder: (images(batch=3, seed=seed) for seed in range(4)),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("every", [1, 2])
def test_interrupted_twice(source: str, every: int, folder: Path, tmp_path: Path) -> None:
    uninterrupted, expected_measures = make_run(SOURCES[source](folder), on_error="skip")
    uninterrupted.observe(*expected_measures)
    state = tmp_path / "state"
    for after in (7, 9):
        run, measures = make_run(SOURCES[source](folder), on_error="skip")
        with pytest.raises(KeyboardInterrupt):
            run.observe(*measures, progress=Interrupts(after), state=state, every=every)
        assert state.is_file()
    run, measures = make_run(SOURCES[source](folder), on_error="skip")
    progress: list[int] = []
    run.observe(*measures, progress=progress.append, state=state, every=every)
    assert progress[0] > 0
    assert sum(progress) == len(run.images.names) == len(uninterrupted.images.names)
    for measure, expected_measure in zip(measures, expected_measures, strict=True):
        result = measure.compute(run.provenance({}))
        expected = expected_measure.compute(uninterrupted.provenance({}))
        assert result.provenance == expected.provenance
        np.testing.assert_equal(result_arrays(result), result_arrays(expected))
    if source == "folder":
        np.testing.assert_array_equal(run.images.kept(), uninterrupted.images.kept())
        assert run.images.skipped == uninterrupted.images.skipped != []
    else:  # the first images cannot be read again, and others must not take their place
        assert len(uninterrupted.images.kept()) == 4
        assert run.images.kept() is None


def test_a_complete_run_is_not_repeated(folder: Path, tmp_path: Path) -> None:
    first, measures = make_run(folder, on_error="skip")
    first.observe(*measures, state=tmp_path / "state")
    again, measures = make_run(folder, on_error="skip")
    again.model.register_forward_hook(lambda *_: pytest.fail("the model ran again"))
    again.observe(*measures, state=tmp_path / "state")
    assert measures[0].compute().num_images == 10


def test_the_state_of_another_run_raises(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    run, measures = make_run(images(batch=5))
    run.observe(*measures, state=state)
    other, measures = make_run(images(batch=6))
    with pytest.raises(InputError, match="another run, which differs in its images;"):
        other.observe(*measures, state=state)
    run, measures = make_run(images(batch=5))
    with pytest.raises(InputError, match="another run, which differs in its measures;"):
        run.observe(measures[0], state=state)
    other, measures = make_run(images(batch=5))
    other.model.config = replace(other.model.config, norm_eps=1e-5)  # the weights are the same
    with pytest.raises(InputError, match="another run, which differs in its model;"):
        other.observe(*measures, state=state)
    skipping, measures = make_run(images(batch=5), on_error="skip")
    skipping.observe(*measures, state=state)
    with torch.no_grad():
        run.model.norm.bias += 1
    with pytest.raises(InputError, match="another run, which differs in its model;"):
        AttentionRun(run.model, images(batch=5), preprocessing=PREPROCESSING, device="cpu", batch_size=2).observe(
            *measures, state=state
        )
    with pytest.raises(InputError, match=r"observers without a state .* cannot be resumed; leave out state="):
        run.observe(Assemble(), state=state)


def test_killed_three_times(tmp_path: Path) -> None:
    """SIGKILL, each time as soon as a new state was written; then the command ends as an uninterrupted one does."""
    arguments = ["distance", "--limit", "128", "--batch-size", "2", "--resume", "--out"]
    command = [
        sys.executable,
        "-c",
        "import torch; torch.set_num_threads(1); from vit_probe.cli.commands import main; main()",
        *arguments,
    ]
    killed, uninterrupted = tmp_path / "killed", tmp_path / "uninterrupted"
    state = killed / "run-state.safetensors"
    times = []
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
        times.append(state.stat().st_mtime_ns)
    assert sorted(set(times)) == times  # each got further
    for out in (killed, uninterrupted):
        subprocess.run([*command, str(out)], check=True, stdout=subprocess.DEVNULL)
    resumed, expected = (pd.read_csv(out / "attention_distance.csv") for out in (killed, uninterrupted))
    pd.testing.assert_frame_equal(resumed, expected, check_exact=True)
    assert not state.exists()
    names = [{path.name for path in out.iterdir() if not path.name.startswith(".")} for out in (killed, uninterrupted)]
    assert names[0] == names[1]
