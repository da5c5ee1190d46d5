"""The study of trained and random weights: both columns against the measures, and the finding that follows from them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from analyses.trained_vs_random import MEASURES, found, main
from tests.analyses.conftest import typed
from tests.example_models import classifier
from vit_probe import (
    attention_entropy,
    attention_rollout,
    load_model,
    mean_attention_distance,
    patch_filters,
    position_similarity,
    sample_photographs,
    save_model,
)
from vit_probe.cli.study import Format, StudyOptions
from vit_probe.measures.patch_filters import low_frequency_share
from vit_probe.models.reinitialize import random_weights
from vit_probe.results import weights_sha256


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, dict]:
    """Table and finding of the bundled model on a few photographs."""
    out = tmp_path_factory.mktemp("trained")
    main(StudyOptions(out=out, limit=6, format=[Format.png]))
    assert {path.name for path in out.iterdir()} == {f"trained_vs_random.{ending}" for ending in ("png", "csv", "json")}
    return pd.read_csv(out / "trained_vs_random.csv"), json.loads((out / "trained_vs_random.json").read_text())


def test_both_columns_agree_with_the_measures(shown: tuple[pd.DataFrame, dict]) -> None:
    table, kept = shown
    assert list(table) == ["measure", "number", "unit", "trained", "random"]
    assert tuple(table["measure"].unique()) == MEASURES
    photographs = sample_photographs(6)
    demo = load_model("demo")
    for name, model in (("trained", demo), ("random", random_weights(demo, seed=0))):
        value = table.set_index(["measure", "number"])[name]
        distance = mean_attention_distance(model, photographs).distance
        entropy = attention_entropy(model, photographs).entropy
        rollout = attention_rollout(model, photographs).maps.reshape(6, -1)
        expected = {
            ("attention_distance", "range of heads"): distance.max() - distance.min(),
            ("attention_entropy", "lowest head"): entropy.min(),
            ("patch_filters", "low frequencies"): low_frequency_share(patch_filters(model).filters),
            ("position_similarity", "neighbours"): position_similarity(model).summary()["neighbours"][0],
            ("rollout", "largest over mean"): np.median(rollout.max(1) / rollout.mean(1)),
        }
        for place, number in expected.items():
            assert value[place] == pytest.approx(number, rel=1e-3), place
        assert kept["provenance"][name]["model"]["weights_sha256"] == weights_sha256(model)
    assert kept["provenance"]["seed"] == 0


def test_the_finding_follows_from_the_numbers(shown: tuple[pd.DataFrame, dict]) -> None:
    table, kept = shown
    numbers = table.set_index(["measure", "number"])
    far, smooth, near = (
        numbers.loc[place]
        for place in (
            ("attention_distance", "range of heads"),
            ("patch_filters", "low frequencies"),
            ("position_similarity", "neighbours"),
        )
    )
    demo, photographs = load_model("demo"), sample_photographs(6)
    maps = [attention_rollout(model, photographs).maps for model in (demo, random_weights(demo, seed=0))]
    correlation = np.median([np.corrcoef(one.ravel(), other.ravel())[0, 1] for one, other in zip(*maps, strict=True)])
    text = kept["finding"]
    assert f"from {far.random:.1f} to {far.trained:.1f} px" in text
    assert f"filters from {smooth.random:.2f} to {smooth.trained:.2f}" in text
    assert f"positions from {near.random:.2f} to {near.trained:.2f}" in text
    assert f"correlate at {correlation:.2f} (median)" in text
    holds = far.trained >= 2 * far.random and min(smooth.trained - smooth.random, near.trained - near.random) >= 0.1
    more = numbers.loc["rollout", "largest over mean"]
    assert kept["as_published"] == bool(holds and more.trained - 1 >= 2 * (more.random - 1))


def test_an_untrained_model_does_not_differ_from_random_weights_as_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_model(random_weights(classifier(depth=2), seed=1), tmp_path / "untrained.safetensors")  # type: ignore[arg-type]
    arguments = ["--model", checkpoint, "--limit", 4, "--out", tmp_path / "out"]
    assert typed(monkeypatch, main, *arguments) == 0
    printed = capsys.readouterr().out
    assert "(not as published)" in printed
    before, after = re.findall(r"positions from (-?\d\.\d\d) to (-?\d\.\d\d)", printed)[0]
    assert max(abs(float(before)), abs(float(after))) < 0.3


# Trained and random, of a model with all measures.
RANGES = {
    ("attention_distance", "range of heads"): (20.0, 10.0),
    ("attention_entropy", "range of heads"): (2.0, 1.0),
    ("patch_filters", "low frequencies"): (0.7, 0.3),
    ("position_similarity", "neighbours"): (0.6, 0.1),
    ("rollout", "largest over mean"): (1.6, 1.1),
}


@pytest.mark.parametrize(
    ("what", "changed", "correlation", "holds"),
    [
        ("as published", {}, 0.4, True),
        ("the range of heads does not double", {("attention_distance", "range of heads"): (19.0, 10.0)}, 0.4, False),
        ("filters no smoother", {("patch_filters", "low frequencies"): (0.35, 0.3)}, 0.4, False),
        ("neighbours no more similar", {("position_similarity", "neighbours"): (0.15, 0.1)}, 0.4, False),
        ("positions are not learned", {("position_similarity", "neighbours"): (0.6, 0.6)}, 0.4, True),
        ("no position embedding", {("position_similarity", "neighbours"): (np.nan, np.nan)}, 0.4, True),
        ("rollout is nearly uniform", {("rollout", "largest over mean"): (1.15, 1.1)}, 0.4, False),
        ("constant maps, without a correlation", {}, float("nan"), True),
        ("heads that do not differ", {("attention_distance", "range of heads"): (0.0, 0.0)}, 0.4, None),
        ("without rollout", {}, None, True),
    ],
)
def test_each_criterion_decides(what: str, changed: dict[Any, Any], correlation: float | None, holds: bool | None) -> None:
    rows = [(*place, "", *values) for place, values in (RANGES | changed).items()]
    table = pd.DataFrame(rows, columns=["measure", "number", "unit", "trained", "random"])
    assert found(table, correlation).holds is holds, what


def test_a_model_without_rollout_is_judged_by_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import SwinConfig, SwinModel, ViTImageProcessor

    torch.manual_seed(0)
    sizes = dict(image_size=32, patch_size=4, window_size=4, embed_dim=16, depths=[2, 2], num_heads=[1, 2])
    SwinModel(SwinConfig(**sizes)).save_pretrained(tmp_path / "swin")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "swin")
    assert typed(monkeypatch, main, "--model", tmp_path / "swin", "--limit", 4, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "rollout" not in printed.partition("(not as published)")[0]
    assert "rollout" not in set(pd.read_csv(tmp_path / "out" / "trained_vs_random.csv").measure)


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(monkeypatch, main, "--model", "nowhere.pt", "--out", tmp_path) == 2
    assert "there is no checkpoint file or folder nowhere.pt" in capsys.readouterr().err
