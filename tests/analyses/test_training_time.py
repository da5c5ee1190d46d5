"""Snapshots of a training, measured one after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from analyses.training_time import found, main
from tests import reference
from tests.analyses.conftest import typed
from tests.analyses.small_models import attention_distances, new_model, write_model
from vit_probe import InputError, VisionTransformer, save_model
from vit_probe.cli.study import StudyOptions

PLACES = np.indices((4, 4)).reshape(2, -1).T


def learned(model: VisionTransformer) -> VisionTransformer:
    """With positions whose similarity falls with distance, and a near and a far head in the first layer."""
    apart = np.linalg.norm(PLACES[:, None] - PLACES[None], axis=-1)
    values, vectors = np.linalg.eigh(np.exp(-apart / 3) - 0.3)
    table = torch.from_numpy(vectors * np.sqrt(values.clip(0))).float()
    with torch.no_grad():
        model.pos_embed[0, 1:] = 4 * table
        query, key, _ = model.blocks[0].attn.qkv.weight.chunk(3)
        key[:8] = query[:8].mul_(4.0)
        query[8:] = 0
    return model


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, VisionTransformer]]:
    folder = tmp_path_factory.mktemp("training")
    torch.manual_seed(0)
    before = new_model(seed=3, scale=0.1)
    with torch.no_grad():  # no two positions are similar
        before.pos_embed[0, 1:] = torch.eye(16) + 0.05 * torch.randn(16, 16)
    models = {0: before, 2: new_model(seed=5), 10: learned(new_model())}
    for epoch, model in models.items():
        save_model(model, folder / (f"epoch-{epoch:03d}.safetensors" if epoch < 10 else "model.safetensors"))
    return folder, models


def study_options(model: Path, photographs: Path, out: Path) -> StudyOptions:
    return StudyOptions(model=str(model), images=[photographs], out=out)


def test_one_row_per_epoch(training: tuple[Path, dict[int, VisionTransformer]], photographs: Path, tmp_path: Path) -> None:
    folder, models = training
    main(study_options(folder / "model.safetensors", photographs, tmp_path), epochs=10, snapshots=folder)
    table = pd.read_csv(tmp_path / "training_time.csv")
    kept = json.loads((tmp_path / "training_time.json").read_text())
    assert table.epoch.tolist() == [0, 2, 10]
    apart = np.linalg.norm(PLACES[:, None] - PLACES[None], axis=-1)
    pairs = ~np.eye(16, dtype=bool)
    for row, model in zip(table.itertuples(), models.values(), strict=True):
        distances = attention_distances(model, photographs)
        found = [row.early_nearest, row.early_farthest, row.early_mean, row.mean]
        expected = [distances[0].min(), distances[0].max(), distances[0].mean(), distances.mean()]
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        positions = model.pos_embed[0, 1:].detach().numpy()
        similarity = reference.position_similarity(positions, 4, 4).reshape(16, 16)
        assert row.nearness == pytest.approx(np.corrcoef(apart[pairs], similarity[pairs])[0, 1], abs=1e-4)
        assert row.neighbours == pytest.approx(similarity[apart == 1].mean(), abs=1e-4)
        assert row.uniform_distance == pytest.approx(reference.uniform_distance(4, 4, (4, 4)))
    assert kept["as_published"] is True
    first, last = table.iloc[0], table.iloc[-1]
    assert f"correlate at {first.nearness:.2f} before training and at {last.nearness:.2f} after 10 epochs" in kept["finding"]
    assert f"before training, and from {last.early_nearest:.1f} to {last.early_farthest:.1f} px after" in kept["finding"]
    assert list(kept["provenance"]) == ["before training", "epoch 2", "epoch 10"]


def test_a_training_that_taught_nothing_is_not_as_published(
    training: tuple[Path, dict[int, VisionTransformer]], photographs: Path, tmp_path: Path
) -> None:
    folder, _ = training
    main(study_options(folder / "epoch-002.safetensors", photographs, tmp_path), epochs=10, snapshots=folder)
    assert json.loads((tmp_path / "training_time.json").read_text())["as_published"] is False


@pytest.mark.parametrize(
    ("what", "first", "last", "holds"),
    [
        ("as published", (0.02, 26, 32), (-0.7, 3, 26), True),
        ("near already before", (-0.2, 26, 32), (-0.7, 3, 26), False),
        ("farther positions are more similar before", (0.2, 26, 32), (-0.7, 3, 26), False),
        ("no nearness at the end", (0.02, 26, 32), (-0.4, 3, 26), False),
        ("distances are not judged", (0.02, 3, 32), (-0.7, 3, 8), True),
    ],
)
def test_each_criterion_decides(what: str, first: tuple[float, ...], last: tuple[float, ...], holds: bool) -> None:
    """Rows are nearness, and the smallest and largest distance of an early head; the epoch between the two decides nothing."""
    columns = ["nearness", "early_nearest", "early_farthest"]
    table = pd.DataFrame([first, (0.9, 1, 1), last], columns=columns).assign(epoch=[0, 5, 9], neighbours=0.5)
    assert found(table).holds is holds, what


def test_snapshots_of_another_training(training: tuple[Path, Any], photographs: Path, tmp_path: Path) -> None:
    folder, _ = training
    write_model(tmp_path / "other.safetensors", "sincos_2d")
    message = r"epoch-000.safetensors differs from .*/other.safetensors in its position; pass the snapshots of"
    with pytest.raises(InputError, match=message):
        main(study_options(tmp_path / "other.safetensors", photographs, tmp_path), epochs=10, snapshots=folder)


def test_models_without_a_configuration_are_not_compared_by_it(
    training: tuple[Path, Any], photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = training
    monkeypatch.setattr("analyses.training_time.model_config", lambda network: None)
    main(study_options(folder / "model.safetensors", photographs, tmp_path), epochs=10, snapshots=folder)
    assert len(pd.read_csv(tmp_path / "training_time.csv")) == 3


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundled model and its snapshots: no nearness before training, and more of it with every snapshot."""
    assert typed(monkeypatch, main, "--limit", 4, "--out", tmp_path) == 0
    table = pd.read_csv(tmp_path / "training_time.csv")
    assert table.epoch.tolist() == [0, 1, 4, 16, 24]
    assert table.nearness.iloc[0] == pytest.approx(0, abs=0.05)
    assert table.nearness.iloc[-1] == pytest.approx(-0.71, abs=0.01)
    assert "(as published)" in capsys.readouterr().out
    assert (tmp_path / "training_time.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_snapshots(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no .*/epoch-000\.safetensors; pass the folder of a training's snapshots"):
        main(StudyOptions(out=tmp_path), snapshots=tmp_path)
