"""The filters of a model beside those of random weights and of a convolutional network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.fft import dctn

from analyses.patch_filters import main
from tests import reference
from tests.analyses.conftest import typed
from tests.example_models import small_vit
from vit_probe import VisionTransformer, load_model, save_model
from vit_probe.cli.study import WeightsStudyOptions


def kept(out: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    return pd.read_csv(out / "patch_filters.csv"), json.loads((out / "patch_filters.json").read_text())


def drawn(table: pd.DataFrame, weights: str, size: tuple[int, int]) -> np.ndarray:
    """The filters in the table, (filter, channel, row, col)."""
    rows = table[table.weights == weights].sort_values(["filter", "channel", "row", "col"])
    return rows.weight.to_numpy().reshape(-1, 3, *size)


def share(filters: np.ndarray) -> float:
    """Share of the lower half of the frequencies along both axes."""
    energy = (dctn(filters, axes=(2, 3), norm="ortho") ** 2).sum(axis=(0, 1))
    energy[0, 0] = 0
    low = energy[: (energy.shape[0] + 1) // 2, : (energy.shape[1] + 1) // 2]
    return float(low.sum() / energy.sum())


def model_of(filters: torch.Tensor, path: Path) -> VisionTransformer:
    model = small_vit(image_size=(32, 32), patch_size=(8, 8), embed_dim=len(filters))
    with torch.no_grad():
        model.patch_embed.proj.weight.copy_(filters)  # type: ignore[union-attr,operator]
    save_model(model, path)
    return model


def test_the_bundled_model_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, main, "--out", tmp_path, "--format", "png", "--format", "pdf") == 0
    table, study = kept(tmp_path)
    weight = load_model("demo").patch_embed.proj.weight.detach().double().numpy()  # type: ignore[union-attr,operator]
    trained, random = drawn(table, "trained", (8, 8)), drawn(table, "random", (8, 8))
    np.testing.assert_allclose(trained, reference.patch_filter_pca(weight, 28)[0], atol=1e-5)
    assert random.shape == trained.shape
    assert study["finding"] == (
        f"The lowest quarter of spatial frequencies holds {share(trained):.0%} of the spatial variance of the first 28 "
        f"components of the filters, and {share(random):.0%} if weights are random."
    )
    assert share(trained) == pytest.approx(0.71, abs=0.005)
    assert share(random) == pytest.approx(15 / 63, abs=0.05)
    assert study["as_published"]
    assert set(study["provenance"]) == {"trained", "random", "seed"}
    assert f"{study['finding']} (as published)" in capsys.readouterr().out
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {f"patch_filters.{ending}" for ending in ("png", "pdf", "csv", "json")}
    assert typed(monkeypatch, main, "--out", tmp_path, "--format", "png", "--format", "pdf") == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_filters_that_are_not_smooth_are_not_as_published(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    model_of(torch.randn(32, 3, 8, 8, generator=generator), tmp_path / "rough.safetensors")
    main(WeightsStudyOptions(model=str(tmp_path / "rough.safetensors"), out=tmp_path))
    assert kept(tmp_path)[1]["as_published"] is False
    smooth = torch.nn.functional.interpolate(torch.randn(32, 3, 3, 3, generator=generator), (8, 8), mode="bicubic")
    model_of(smooth, tmp_path / "smooth.safetensors")
    main(WeightsStudyOptions(model=str(tmp_path / "smooth.safetensors"), out=tmp_path))
    assert kept(tmp_path)[1]["as_published"]


def test_a_convolutional_network_beside_it(tmp_path: Path) -> None:
    filters = torch.randn(16, 3, 11, 11, generator=torch.Generator().manual_seed(0)).cumsum(-1).cumsum(-2)
    torch.save({"features.0.weight": filters, "features.3.weight": torch.rand(4, 16, 3, 3)}, tmp_path / "alexnet.pth")
    main(WeightsStudyOptions(out=tmp_path), cnn=tmp_path / "alexnet.pth")
    table, study = kept(tmp_path)
    convolutional = drawn(table, "convolutional", (11, 11))
    np.testing.assert_allclose(convolutional, filters.numpy(), rtol=1e-5)
    assert table[table.weights == "convolutional"].explained_variance_ratio.isna().all()
    expected = f" It holds {share(convolutional):.0%} of that of the first-layer filters of alexnet.pth."
    assert study["finding"].endswith(expected)
    assert study["provenance"]["convolutional"]["layers"] == ["features.0.weight"]
    assert study["as_published"]


def test_a_file_without_filters_gives_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"fc.weight": torch.rand(4, 4)}, tmp_path / "mlp.pth")
    assert typed(monkeypatch, main, "--cnn", tmp_path / "mlp.pth", "--out", tmp_path) == 2
    assert typed(monkeypatch, main, "--cnn", tmp_path / "absent.pth", "--out", tmp_path) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "mlp.pth holds no convolution over 3 colour channels" in first
    assert "there is no file" in second
    assert not (tmp_path / "patch_filters.csv").exists()
