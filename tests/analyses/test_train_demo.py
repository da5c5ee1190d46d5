"""The training program as it is typed: killed, gone on with, and refusing what makes no sense."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from analyses.train_demo import app
from tests.analyses.conftest import typed
from vit_probe import load_model

ROOT = Path(__file__).parents[2]
SMALL = ["--image-size", "16", "--patch-size", "4", "--width", "16", "--depth", "2", "--heads", "2", "--set", "batch_size=32"]


def test_killed_and_gone_on_with(
    sheets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL at some moment after the first epoch; the same command then ends as an undisturbed run does."""
    arguments = [sheets, *SMALL, "--set", "epochs=8", "--set", "full_epochs=1"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    threads = f"import torch; torch.set_num_threads({torch.get_num_threads()}); from analyses.train_demo import app; app()"
    process = subprocess.Popen([sys.executable, "-c", threads, *map(str, arguments), "--out", str(killed)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while not (killed / "state.pt").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert (killed / "state.pt").exists()
    assert not (killed / "model.safetensors").exists()
    assert typed(monkeypatch, app, *arguments, "--out", killed) == 0
    printed = capsys.readouterr().out
    assert "epoch   1 of 8" not in printed
    assert "epoch   8 of 8   loss" in printed
    assert "validation top-1" in printed.splitlines()[-1]
    assert typed(monkeypatch, app, *arguments, "--out", whole) == 0
    assert not [path for path in killed.iterdir() if path.name.startswith(".")]
    losses = [pd.read_csv(out / "log.csv").loss for out in (killed, whole)]
    pd.testing.assert_series_equal(losses[0], losses[1], rtol=1e-3)
    model = load_model(killed / "model.safetensors")
    assert (model.config.num_classes, model.config.image_size, model.config.depth) == (3, (16, 16), 2)
    assert model.preprocessing is not None
    assert model.preprocessing.size == (16, 16)


@pytest.mark.parametrize("position", ["none", "learned_2d", "sincos_2d"])
def test_other_position_embeddings(position: str, sheets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        typed(
            monkeypatch,
            app,
            sheets,
            *SMALL,
            "--set",
            "epochs=1",
            "--set",
            "warmup=0",
            "--position",
            position,
            "--out",
            tmp_path,
        )
        == 0
    )
    assert load_model(tmp_path / "model.safetensors").config.position == position


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no image file or folder nowhere/train"),
        (["DATA", "--set", "speed=9"], "--set speed=9: write NAME=VALUE"),
        (["DATA", "--heads", "7"], "embed_dim 144 is not divisible by num_heads 7"),
        (["DATA", "--image-size", "60"], "does not divide into patches of 8 x 8"),
        (["DATA", "--position", "round"], "'round' is not one of 'none', 'learned_1d', 'learned_2d', 'sincos_2d'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(
    arguments: list[str],
    message: str,
    sheets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(sheets) if argument == "DATA" else argument for argument in arguments]
    assert typed(monkeypatch, app, *given, "--out", tmp_path / "out") == 2
    complaint = capsys.readouterr().err
    assert message in complaint
    assert len(complaint.splitlines()) == 1
    assert not (tmp_path / "out" / "state.pt").exists()
