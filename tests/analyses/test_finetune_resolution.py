"""Fine-tuning at a higher resolution: the three accuracies, and the position table, which starts from that of `resize`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from analyses import finetune_resolution
from analyses.finetune_resolution import main
from analyses.small_images import read_data
from analyses.training import Recipe, accuracy, fit
from tests.analyses.conftest import typed
from vit_probe import Preprocessing, VisionTransformer, ViTConfig, load_model, save_model

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="training takes torch.optim.Muon, of torch 2.9")


@pytest.fixture(scope="module")
def trained(sheets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(image_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3))
    model.preprocessing = Preprocessing((16, 16), resize=16)
    out = tmp_path_factory.mktemp("trained")
    recipe = Recipe(epochs=4, warmup=0.5, batch_size=32, full_epochs=4, mixing=0.0, averaging=0.9, matrix_learning_rate=1e-2)
    fit(model, *read_data(sheets, 16), recipe, out)
    return out / "model.safetensors"


def test_three_accuracies(
    trained: Path, sheets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [sheets, "--model", trained, "--image-size", 24, "--out", tmp_path, "--set", "batch_size=64"]
    assert typed(monkeypatch, main, *arguments) == 0
    table = pd.read_csv(tmp_path / "accuracy.csv")
    assert table.step.tolist() == ["before resizing", "right after resizing", "after fine-tuning"]
    assert table.image_size.tolist() == [16, 24, 24]
    _, small = read_data(sheets, 16)
    _, large = read_data(sheets, 24)
    expected = [accuracy(load_model(trained), small), accuracy(load_model(trained).resize(24), large)]
    tuned = load_model(tmp_path / "model.safetensors")
    assert tuned.config.image_size == (24, 24)
    assert tuned.pos_embed.shape == (1, 1 + 36, 32)
    assert tuned.preprocessing is not None
    assert tuned.preprocessing.size == (24, 24)
    assert table[["top1", "top5"]].iloc[:2].to_numpy() == pytest.approx(torch.tensor(expected).numpy())
    assert table.top1.iloc[2] == pytest.approx(accuracy(tuned, large)[0], abs=5)  # the file holds float16
    before = load_model(trained).resize(24).pos_embed
    moved = (tuned.pos_embed - before).abs().max()
    assert 5e-4 < moved < 0.1  # trained on, from the resized table
    assert "right after resizing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-size", "25"], "does not divide into patches of 4 x 4"),
        (["--model", "nowhere.pt"], "there is no checkpoint file or folder nowhere.pt"),
        (["--model", "demo", "--image-size", "96"], "demo has 100 classes, but"),
    ],
)
def test_impossible_options(
    arguments: list[str],
    message: str,
    trained: Path,
    sheets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert typed(monkeypatch, main, sheets, "--model", trained, "--out", tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "state.pt").exists()


def test_a_model_with_other_preprocessing(
    sheets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Path
) -> None:
    model = load_model(trained)
    model.preprocessing = Preprocessing((16, 16), resize=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    other = save_model(model, tmp_path / "other.safetensors")
    assert typed(monkeypatch, main, sheets, "--model", other, "--image-size", 24, "--out", tmp_path) == 2
    assert (
        "does not standardise images with ImageNet's mean and standard deviation; pass a model that does"
        in capsys.readouterr().err
    )


def test_a_model_of_another_library(
    sheets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetune_resolution, "load_model", lambda name: torch.nn.Linear(2, 2))
    assert typed(monkeypatch, main, sheets, "--model", "timm:swin", "--out", tmp_path / "out") == 2
    assert "timm:swin is a Linear of another library; pass a model that loads as a VisionTransformer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_of_images_that_are_not_square(
    sheets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Path
) -> None:
    wide = save_model(load_model(trained).resize((16, 32)), tmp_path / "wide.safetensors")
    assert typed(monkeypatch, main, sheets, "--model", wide, "--image-size", 24, "--out", tmp_path) == 2
    assert "takes images of 16 x 32 pixels; pass a model of square images" in capsys.readouterr().err
