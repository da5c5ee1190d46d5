"""Local heads of a pure ViT and of a hybrid, counted by the literal definition."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analyses.hybrid import HybridOptions, found, main
from tests import reference
from tests.analyses.conftest import typed
from tests.analyses.small_models import attention_distances, write_model
from tests.example_models import small_vit
from vit_probe import InputError, Preprocessing, VisionTransformer, save_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, VisionTransformer]]:
    """A hybrid whose attention is nearly uniform, and a pure model with near heads in its first layer."""
    folder = tmp_path_factory.mktemp("models")
    near = write_model(folder / "pure.safetensors", "learned_1d", "patches")
    query, key, _ = near.blocks[0].attn.qkv.weight.data.chunk(3)
    key.copy_(query.mul_(3.0))  # a token attends to similar tokens, above all to itself
    near.blocks[0].attn.qkv.bias.data.zero_()
    save_model(near, folder / "pure.safetensors")
    even = write_model(folder / "hybrid.safetensors", "learned_1d", "hybrid", scale=0.1)
    return {"pure": (folder / "pure.safetensors", near), "hybrid": (folder / "hybrid.safetensors", even)}


def run(models: dict[str, tuple[Path, VisionTransformer]], photographs: Path, out: Path) -> None:
    main(HybridOptions(model=str(models["pure"][0]), hybrid=str(models["hybrid"][0]), images=[photographs], out=out))


def test_local_heads_are_counted(models: dict[str, tuple[Path, VisionTransformer]], photographs: Path, tmp_path: Path) -> None:
    run(models, photographs, tmp_path)
    table, kept = pd.read_csv(tmp_path / "hybrid.csv"), json.loads((tmp_path / "hybrid.json").read_text())
    local = {}
    for name, (_, model) in models.items():
        expected = attention_distances(model, photographs)
        rows = table[table.model == name]
        np.testing.assert_allclose(rows.distance, expected.ravel(), rtol=1e-4)
        near = expected < reference.uniform_distance(4, 4, (4, 4)) / 2
        assert rows.local.tolist() == near.ravel().tolist()
        local[name] = int(near[0].sum())  # 3 layers: the first is the first third
    assert local == {"pure": 2, "hybrid": 0}
    text = "In the first third of the layers, 2 of 2 heads of the pure ViT and 0 of 2 heads of the hybrid are local (distance"
    assert kept["finding"].startswith(text)
    assert kept["as_published"] is True
    assert set(kept["provenance"]) == {"pure", "hybrid"}
    assert (tmp_path / "hybrid.png").read_bytes().startswith(b"\x89PNG")


def test_the_other_way_round(models: dict[str, tuple[Path, VisionTransformer]], photographs: Path, tmp_path: Path) -> None:
    run(models, photographs, tmp_path)
    tables = {str(name): table for name, table in pd.read_csv(tmp_path / "hybrid.csv").groupby("model")}
    finding = found(tables["hybrid"], tables["pure"])
    assert finding.holds is None  # without local heads in the pure model, nothing can be less pronounced
    assert found(tables["pure"], tables["pure"]).holds is False
    assert "0 of 2 heads of the pure ViT and 2 of 2 heads of the hybrid are local" in finding.text


def test_from_the_command_line(
    models: dict[str, tuple[Path, VisionTransformer]],
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = small_vit()
    other.preprocessing = Preprocessing((24, 24), resize=24)
    save_model(other, tmp_path / "other.safetensors")
    arguments = ["--model", tmp_path / "other.safetensors", "--hybrid", models["hybrid"][0], "--images", photographs]
    assert typed(monkeypatch, main, *arguments, "--limit", 2, "--out", tmp_path) == 0
    captured = capsys.readouterr()
    uniform = reference.uniform_distance(3, 4, (8, 6)), reference.uniform_distance(4, 4, (4, 4))
    assert (
        "note: the distance of uniform attention is {:.1f} px in one model and {:.1f} px in the".format(*uniform)
        in captured.err
    )
    assert "(undecided)" in captured.out
    assert set(pd.read_csv(tmp_path / "hybrid.csv").num_images) == {2}
    arguments[3] = tmp_path / "absent.safetensors"
    assert typed(monkeypatch, main, *arguments, "--out", tmp_path) == 2
    assert "absent.safetensors" in capsys.readouterr().err


def test_models_without_local_heads_leave_it_open(
    models: dict[str, tuple[Path, VisionTransformer]], photographs: Path, tmp_path: Path
) -> None:
    run({"pure": models["hybrid"], "hybrid": models["hybrid"]}, photographs, tmp_path)
    kept = json.loads((tmp_path / "hybrid.json").read_text())
    assert kept["as_published"] is None
    assert kept["published"] == ["open: local heads are less pronounced in the hybrid"]


def test_a_model_that_is_not_a_hybrid(
    models: dict[str, tuple[Path, VisionTransformer]], photographs: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match=r"--hybrid .*pure.safetensors is not a hybrid: no convolutional network makes its patches"
    ):
        run({"pure": models["pure"], "hybrid": models["pure"]}, photographs, tmp_path)


def test_the_models_that_come_with_the_repository(tmp_path: Path) -> None:
    main(HybridOptions(limit=4, out=tmp_path))
    table = pd.read_csv(tmp_path / "hybrid.csv")
    assert table.groupby("model").size().tolist() == [24, 24]
    assert table.uniform_distance.nunique() == 1
