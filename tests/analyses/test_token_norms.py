"""The study's norms of tokens against those computed from the model's blocks called one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from analyses.token_norms import found, main
from tests.analyses.conftest import typed
from tests.analyses.small_models import write_model, write_photographs
from vit_probe import Preprocessing, VisionTransformer, ViTConfig, save_model
from vit_probe.cli.study import StudyOptions
from vit_probe.data.image_files import read_image


def test_the_numbers_are_those_of_the_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "small.safetensors")
    folder = write_photographs(tmp_path / "photographs", 6)
    main(StudyOptions(model=str(tmp_path / "small.safetensors"), images=[folder], out=tmp_path / "out", limit=5))
    table = pd.read_csv(tmp_path / "out" / "token_norms.csv")
    kept = json.loads((tmp_path / "out" / "token_norms.json").read_text())
    assert (tmp_path / "out" / "token_norms.png").stat().st_size > 10000
    assert model.preprocessing is not None
    with torch.no_grad():
        tokens = model._embed(torch.stack([model.preprocessing(read_image(path)) for path in sorted(folder.iterdir())[:5]]))
        for layer, block in enumerate(model.blocks):
            tokens = block(tokens)
            norms = tokens[:, 1:].norm(dim=-1).flatten().double().numpy()
            mine = table[table.layer == layer]
            edges = np.append(mine.norm_from, mine.norm_to.iloc[-1])
            assert np.abs(np.histogram(norms, edges)[0] - mine.tokens).sum() <= 2
            assert mine.tokens.sum() == 5 * 16
            assert mine["median"].iloc[0] == pytest.approx(np.quantile(norms, 0.5, method="inverted_cdf"), rel=0.005)
    last = table[table.layer == 2].iloc[0]
    assert kept["as_published"] is bool(last.artifacts == 0)  # the model is small
    assert "Of the 3 layers of a model with 0.0 million parameters" in kept["finding"]
    assert kept["provenance"]["images"]["count"] == 5
    assert kept["finding"] in capsys.readouterr().out


def layers(*artifacts: float) -> pd.DataFrame:
    columns = {
        "layer": np.arange(len(artifacts)),
        "median": 20.0,
        "highest": 50.0,
        "artifacts": artifacts,
        "artifact_images": [0.9 if part else 0.0 for part in artifacts],
        "typical_norm": 21.0,
        "artifact_norm": [300.0 if part else np.nan for part in artifacts],
    }
    return pd.DataFrame(columns)


@pytest.mark.parametrize(("parameters", "large"), [(2.3e6, False), (304e6, True)])
def test_large_models_have_artifacts_and_small_ones_none(parameters: float, large: bool) -> None:
    none = found(layers(0.0, 0.0), int(parameters), 0)
    assert none.text.endswith("none has artifacts; in the last, the highest norm is 2.5 times the median.")
    assert none.holds is not large
    some = found(layers(0.0, 0.03, 0.021), int(parameters), 0)
    assert "2 have artifacts, starting with layer 1. Layer 1 has the most: 3 % of the patch tokens, in 90% of the" in some.text
    assert some.text.endswith(
        "norm of 300 compared with 21 for the others. In the last layer, 2.1 % of the patch tokens are artifacts."
    )
    assert some.holds is large
    assert "million parameters and 4 registers, none has artifacts" in found(layers(0.0), int(parameters), 4).text
    assert found(layers(0.0), int(parameters), 4).holds
    assert found(layers(0.03), int(parameters), 4).holds is False


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (dict(num_registers=0), "million parameters, "),
        (dict(num_registers=4), "million parameters and 4 registers, "),
        (dict(num_registers=4, class_token=False, pooling="avg"), "million parameters and 4 registers, "),
        (dict(num_registers=1, class_token=False, pooling="avg"), "million parameters and 1 register, "),
        (dict(num_registers=1), "million parameters and 1 register, "),
        (dict(distillation_token=True), "million parameters, "),
        (dict(distillation_token=True, num_registers=4), "million parameters and 4 registers, "),
    ],
)
def test_registers_are_counted(tokens: dict[str, Any], said: str, tmp_path: Path) -> None:
    sizes = dict(image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    model = VisionTransformer(ViTConfig(**(sizes | tokens)))
    model.preprocessing = Preprocessing((16, 16), resize=16)
    save_model(model, tmp_path / "model.safetensors")
    photographs = write_photographs(tmp_path / "photographs", 4)
    main(StudyOptions(model=str(tmp_path / "model.safetensors"), images=[photographs], out=tmp_path))
    assert said in json.loads((tmp_path / "token_norms.json").read_text())["finding"]


def test_the_bundled_model_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for _ in range(2):
        assert typed(monkeypatch, main, "--limit", 4, "--out", tmp_path, "--format", "png", "--format", "pdf") == 0
        files.append([(tmp_path / f"token_norms.{ending}").read_bytes() for ending in ("png", "pdf", "csv", "json")])
    assert files[0] == files[1]
    table = pd.read_csv(tmp_path / "token_norms.csv")
    assert table.groupby("layer").tokens.sum().tolist() == [4 * 64] * 9


def test_missing_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(monkeypatch, main, "--images", tmp_path / "nowhere", "--out", tmp_path) == 2
    assert "nowhere" in capsys.readouterr().err
