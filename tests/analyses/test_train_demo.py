"""The training program from the command line: killed, continued, and with impossible options."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from analyses.train_demo import initialise, main, small_resnet
from tests.analyses.conftest import typed
from vit_probe import VisionTransformer, ViTConfig, load_model

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="training takes torch.optim.Muon, of torch 2.9")

ROOT = Path(__file__).parents[2]
SMALL = ["--image-size", "16", "--patch-size", "4", "--width", "16", "--depth", "2", "--heads", "2", "--set", "batch_size=32"]


def test_killed_and_continued(
    sheets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After SIGKILL at some moment after the first epoch, the same command ends as an undisturbed run does."""
    arguments = [sheets, *SMALL, "--set", "epochs=8", "--set", "full_epochs=1"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    threads = f"import torch; torch.set_num_threads({torch.get_num_threads()}); from analyses.train_demo import main; "
    threads += "from vit_probe.cli.study import run_study; run_study(main)"
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
    assert typed(monkeypatch, main, *arguments, "--out", killed) == 0
    printed = capsys.readouterr().out
    assert "epoch   1 of 8" not in printed
    assert "epoch   8 of 8   loss" in printed
    assert "validation top-1" in printed.splitlines()[-1]
    assert typed(monkeypatch, main, *arguments, "--out", whole) == 0
    assert not [path for path in killed.iterdir() if path.name.startswith(".")]
    losses = [pd.read_csv(out / "log.csv").loss for out in (killed, whole)]
    pd.testing.assert_series_equal(losses[0], losses[1], rtol=1e-3)
    model = load_model(killed / "model.safetensors")
    assert (model.config.num_classes, model.config.image_size, model.config.depth) == (3, (16, 16), 2)
    assert model.preprocessing is not None
    assert model.preprocessing.size == (16, 16)


@pytest.mark.parametrize("position", ["none", "learned_2d", "sincos_2d", "relative", "rope_2d"])
def test_other_position_embeddings(position: str, sheets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        typed(
            monkeypatch,
            main,
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


@pytest.mark.parametrize("position", ["learned_1d", "none"])
def test_a_hybrid(position: str, sheets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens are the cells of a ResNet's map, as many as there would be patches of this size; the ResNet learns, too."""
    short = ["--set", "epochs=2", "--set", "warmup=0.5", "--set", "full_epochs=1", "--position", position]
    assert typed(monkeypatch, main, sheets, *SMALL, *short, "--stem", "hybrid", "--out", tmp_path) == 0
    model = load_model(tmp_path / "model.safetensors")
    assert model.config.stem is not None
    assert (model.config.patch_size, model.config.patch_stride) == ((1, 1), (4, 4))
    assert model.token_grid(16, 16).num_patches == 16
    before = load_model(tmp_path / "snapshots" / "epoch-000.safetensors")
    for name, value in before.patch_embed.state_dict().items():
        assert not torch.equal(value, model.patch_embed.state_dict()[name]), name


@pytest.mark.parametrize(("patch_size", "layers"), [(4, (1,)), (8, (1, 1)), (16, (1, 1, 1)), (32, (1, 1, 1, 1))])
def test_the_map_of_the_small_resnet_has_one_cell_per_patch(patch_size: int, layers: tuple[int, ...]) -> None:
    assert small_resnet(patch_size).layers == layers
    assert small_resnet(patch_size).stride == patch_size


def test_learned_positions_of_both_kinds_start_with_the_same_norm() -> None:
    sizes = {}
    for position in ("learned_1d", "learned_2d"):
        torch.manual_seed(0)
        config = ViTConfig(32, 4, embed_dim=64, depth=1, num_heads=2, position=position)  # type: ignore[arg-type]
        table = initialise(VisionTransformer(config)).position_table()
        assert table is not None
        sizes[position] = table[0].detach().norm(dim=1).mean().item()
    assert sizes == pytest.approx({"learned_1d": 1, "learned_2d": 1}, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no image file or folder nowhere/train"),
        (["DATA", "--set", "speed=9"], "--set speed=9: write NAME=VALUE"),
        (["DATA", "--heads", "7"], "embed_dim 144 is not divisible by num_heads 7"),
        (["DATA", "--image-size", "60"], "does not divide into patches of 8 x 8"),
        (
            ["DATA", "--stem", "hybrid", "--patch-size", "6", "--image-size", "48"],
            "patches of 4, 8, 16, ... pixels, got 6; pass",
        ),
        (["DATA", "--stem", "hybrid", "--patch-size", "2"], "a hybrid must have patches of 4, 8, 16, ... pixels, got 2"),
        (
            ["DATA", "--position", "round"],
            "'round' is not one of 'none', 'learned_1d', 'learned_2d', 'sincos_2d', 'relative', 'rope_2d'",
        ),
    ],
)
def test_impossible_options_give_one_sentence(
    arguments: list[str],
    message: str,
    sheets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(sheets) if argument == "DATA" else argument for argument in arguments]
    assert typed(monkeypatch, main, *given, "--out", tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1
    assert not (tmp_path / "out" / "state.pt").exists()
