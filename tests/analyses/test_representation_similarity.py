"""Similarity of layers as the study draws it, against the full batch's CKA of the models' blocks called by hand."""

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
from vit_probe.images import read_image


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
    main(model=str(files[0]), other=str(files[1]), images=[folder], out=tmp_path / "out", limit=6)
    table = pd.read_csv(tmp_path / "out" / "representation_similarity.csv")
    kept = json.loads((tmp_path / "out" / "representation_similarity.json").read_text())
    mine, theirs = (blocks(model, folder, 6) for model in models)
    pairs = {"one": (mine, mine), "two": (theirs, theirs), "between the two": (mine, theirs)}
    assert table.models.unique().tolist() == list(pairs)
    maps = {}
    for title, (one, other) in pairs.items():
        maps[title] = table[table.models == title].pivot(index="layer", columns="other_layer", values="similarity").to_numpy()
        np.testing.assert_allclose(maps[title], literal(one, other, [6]), atol=2e-5)
    assert f"has a CKA of {maps['one'][:1, -1:].mean():.2f} with one of the upper half" in kept["finding"]
    assert f"the least of all pairs is {maps['one'].min():.2f}" in kept["finding"]
    assert kept["as_published"] is bool(maps["one"][0, -1] > 0.5)
    assert set(kept["provenance"]) == {"model", "other"}
    assert kept["finding"] in capsys.readouterr().out


def test_a_model_whose_halves_differ_is_not_as_published() -> None:
    alike, within = np.full((4, 4), 0.8), np.eye(4)
    assert found(alike, alike).holds
    finding = found(within, np.eye(4)[::-1])
    assert not finding.holds
    assert finding.text.startswith("A layer of the lower half has a CKA of 0.00 with one of the upper half, on average; ")
    assert "lies 67% of the depth away from its place, and has a CKA of 1.00 with it" in finding.text
    assert found(np.ones((1, 1)), np.ones((1, 3))).holds


def test_the_bundled_models_as_it_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
