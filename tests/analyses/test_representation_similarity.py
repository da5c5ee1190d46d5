"""The study's similarity of layers against the CKA of the full batch, computed from the blocks called one by one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from analyses.representation_similarity import OTHER, found, main
from tests.analyses.conftest import typed
from tests.analyses.small_models import write_model, write_photographs
from tests.measures.test_representation_similarity import literal
from vit_probe import VisionTransformer
from vit_probe.cli.study import Format, StudyOptions
from vit_probe.data.image_files import read_image
from vit_probe.models.reinitialize import random_weights


def blocks(model: VisionTransformer, folder: Path, count: int) -> list[np.ndarray]:
    """The patch tokens after each block."""
    assert model.preprocessing is not None
    passed = []
    with torch.no_grad():
        tokens = model._embed(torch.stack([model.preprocessing(read_image(path)) for path in sorted(folder.iterdir())[:count]]))
        for block in model.blocks:
            tokens = block(tokens)
            passed.append(tokens[:, 1:].numpy())
    return passed


def test_the_numbers_are_those_of_the_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    models = [write_model(path, seed=seed) for seed, path in enumerate(files)]
    folder = write_photographs(tmp_path / "photographs", 7)
    main(StudyOptions(model=str(files[0]), images=[folder], out=tmp_path / "out", limit=6), other=str(files[1]))
    table = pd.read_csv(tmp_path / "out" / "representation_similarity.csv")
    kept = json.loads((tmp_path / "out" / "representation_similarity.json").read_text())
    mine, theirs = (blocks(model, folder, 6) for model in models)
    pairs = {"model": (mine, mine), "other": (theirs, theirs), "between": (mine, theirs)}
    assert table.models.unique().tolist() == list(pairs)
    maps = {}
    for title, (one, other) in pairs.items():
        maps[title] = table[table.models == title].pivot(index="layer", columns="other_layer", values="similarity").to_numpy()
        np.testing.assert_allclose(maps[title], literal(one, other, [6]), atol=2e-5)
    assert f"with one in the upper half is {maps['model'][:1, -1:].mean():.2f} on average" in kept["finding"]
    assert f"the lowest of all pairs is {maps['model'].min():.2f}" in kept["finding"]
    similar = "yes" if maps["model"][0, -1] > 0.5 else "no"
    contrast = "open: more similar than those of a convolutional network"
    assert kept["published"] == [f"{similar}: lower and upper layers are similar (CKA above 0.5)", contrast]
    assert kept["as_published"] is (None if similar == "yes" else False)
    assert set(kept["provenance"]) == {"model", "other", "random"}
    untrained = random_weights(models[0], seed=0)
    untrained.preprocessing = models[0].preprocessing
    expected = literal(*[blocks(untrained, folder, 6)] * 2, [6])[:1, -1:].mean()
    assert f"(with random weights {expected:.2f})" in kept["finding"]
    assert kept["finding"] in capsys.readouterr().out


def test_a_model_whose_halves_differ_is_not_as_published() -> None:
    alike, within = np.full((4, 4), 0.8), np.eye(4)
    assert found(alike, alike, 0.9 * alike).holds is None  # no convolutional network is measured
    finding = found(within, np.eye(4)[::-1], 0.9 * alike)
    assert finding.holds is False
    assert finding.text.startswith(
        "The CKA of a layer in the lower half with one in the upper half is 0.00 on average (with random weights 0.72); "
    )
    assert "lies 67% of the depth away from its position, and has a CKA of 1.00 with it" in finding.text
    assert all(line.startswith("open") for line in found(np.ones((1, 1)), np.ones((1, 3)), np.ones((1, 1))).lines())


def test_two_checkpoints_with_the_same_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_model(tmp_path / name / "model.safetensors", seed=len(name))
    files = [str(tmp_path / name / "model.safetensors") for name in ("a", "b")]
    photographs = write_photographs(tmp_path / "photographs", 4)
    main(StudyOptions(model=files[0], images=[photographs], out=tmp_path, format=[Format.svg]), other=files[1])
    assert not pd.read_csv(tmp_path / "representation_similarity.csv").duplicated(["models", "layer", "other_layer"]).any()
    picture = (tmp_path / "representation_similarity.svg").read_text()
    assert "Layer of model (model)" in picture
    assert "Layer of model (other)" in picture


def test_the_bundled_models_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        assert typed(monkeypatch, main, "--limit", 8, "--out", tmp_path, "--format", "png", "--format", "svg") == 0
        files = [(tmp_path / f"representation_similarity.{ending}").read_bytes() for ending in ("png", "svg", "csv")]
    assert (
        typed(monkeypatch, main, "--limit", 8, "--out", tmp_path, "--format", "png", "--format", "svg", "--other", OTHER) == 0
    )
    assert files == [(tmp_path / f"representation_similarity.{ending}").read_bytes() for ending in ("png", "svg", "csv")]
    assert len(pd.read_csv(tmp_path / "representation_similarity.csv")) == 3 * 81


def test_too_few_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(monkeypatch, main, "--limit", 3, "--out", tmp_path) == 2
    assert "no batch of 4 images or more has been measured yet; 3 images came in smaller ones" in capsys.readouterr().err
