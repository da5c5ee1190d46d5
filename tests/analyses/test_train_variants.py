"""The small models that differ in one thing: trained, gone on with, and those that come with the repository."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from analyses import train_demo
from analyses.masking import seen_patches
from analyses.small_images import read_split
from analyses.train_variants import FOLDER, VARIANTS, main, read_variants
from analyses.training import accuracy
from tests.analyses.conftest import typed
from tests.analyses.small_models import new_model
from vit_probe import load_model

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="training takes torch.optim.Muon, of torch 2.9")

SHEETS = Path(__file__).resolve().parents[2].parent / "shared" / "tiny-imagenet-100"
TINY = "--image-size 16 --patch-size 4 --width 16 --depth 2 --heads 2 --set batch_size=64 --set epochs=2"


def test_all_variants_are_trained_alike(
    sheets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    arguments = [sheets, "--out", out, "--work", work, "--seed", 3, "--", *TINY.split()]
    assert typed(monkeypatch, main, *arguments) == 0
    table = read_variants(out)
    assert list(table.index) == list(VARIANTS)
    assert table[["epochs", "images", "seed"]].drop_duplicates().values.tolist() == [[2, 60, 3]]
    assert table.parameters["learned_1d"] - table.parameters["none"] == 17 * 16
    assert table.parameters["sincos_2d"] == table.parameters["none"]
    assert table.parameters["relative"] - table.parameters["none"] == 2 * (2 * 16 - 1) * 8  # layers, offsets, width of a head
    assert table.parameters["learned_2d"] - table.parameters["none"] == (4 + 4) * 8 + 16
    assert table.parameters["hybrid"] > table.parameters["learned_1d"]
    for name, kind in VARIANTS.items():
        model = load_model(out / f"{name}.safetensors")
        assert model.config.position == kind["position"]
        assert (model.config.stem is not None) == (kind["stem"] == "hybrid")
        assert model.config.patch_stride == (4, 4)
        assert list(table.loc[name, ["top1", "top5"]]) == pytest.approx(
            accuracy(model, read_split(sheets / "val", 16)), abs=1e-3
        )
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert typed(monkeypatch, main, *arguments) == 0  # all is there: nothing is trained again
    assert "loss" not in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    program, data, *options = shlex.split(table.command["hybrid"].removeprefix("python -m "))
    assert (program, data) == ("analyses.train_demo", "DATA")
    assert typed(monkeypatch, train_demo.main, sheets, *options, "--out", tmp_path / "alone") == 0
    assert (tmp_path / "alone" / "model.safetensors").read_bytes() == before["hybrid.safetensors"]


@torch.no_grad()
@pytest.mark.parametrize("position", ["none", "learned_1d", "relative", "rope_2d"])
def test_hidden_patches_leave_the_others_where_they_are(position: str) -> None:
    """The same tokens as from all patches with a mask that hides the same ones, whatever kind of positions there is."""
    model = new_model(position, scale=4.0)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with seen_patches(model, 0.4) as choice:
        tokens = model.forward_features(images)
    mask = torch.zeros(3, 1, 17, 17, dtype=torch.bool)
    mask[:, :, :, 0] = True
    for image, seen in enumerate(choice.seen):
        mask[image, :, :, 1 + seen] = True
    whole = model.forward_features(images, mask=mask)
    torch.testing.assert_close(tokens[:, 0], whole[:, 0], atol=1e-5, rtol=0)
    for image, seen in enumerate(choice.seen):
        torch.testing.assert_close(tokens[image, 1:], whole[image, 1 + seen], atol=1e-5, rtol=0)
    assert (tokens[:, 0] - model.forward_features(images)[:, 0]).abs().max() > 1e-2
    assert not any(block._forward_pre_hooks for block in model.blocks)


def test_the_models_that_come_with_the_repository_are_those_of_the_table() -> None:
    table = read_variants(FOLDER)
    for name, kind in VARIANTS.items():
        model = load_model(FOLDER / f"{name}.safetensors")
        assert (model.config.position, model.config.stem is not None) == (kind["position"], kind["stem"] == "hybrid")
        assert (table.position[name], table.stem[name]) == (kind["position"], kind["stem"])
        assert table.parameters[name] == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert (model.config.patch_stride, model.config.num_classes) == ((8, 8), 100)
    alike = table.command.str.replace(r"--position \w+ --stem \w+", "", regex=True)
    assert alike.nunique() == table.epochs.nunique() == table.seed.nunique() == 1
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 9e6


@pytest.mark.skipif(not SHEETS.is_dir(), reason=f"../shared is not here: {SHEETS} does not exist")
def test_their_accuracies_are_those_of_the_table() -> None:
    table, val = read_variants(FOLDER), read_split(SHEETS / "val", 64)
    for name, row in table.iterrows():
        assert accuracy(load_model(FOLDER / f"{name}.safetensors"), val) == pytest.approx((row.top1, row.top5), abs=0.11)
        assert row.images == len(val.labels)


def test_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(monkeypatch, main, tmp_path / "nowhere", "--out", tmp_path, "--work", tmp_path / "work") == 2
    assert "there is no image file or folder" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.csv"))
