"""The study of attention entropy: its table, and the finding that follows from the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from analyses.attention_entropy import found, main
from tests.analyses.conftest import typed
from tests.example_models import classifier, expected_attention
from vit_probe import load_model, sample_photographs, save_model
from vit_probe.cli.study import Format, StudyOptions


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, dict]:
    """Table and finding of the bundled model on a few photographs."""
    out = tmp_path_factory.mktemp("entropy")
    main(StudyOptions(out=out, limit=4, format=[Format.png]))
    assert {path.name for path in out.iterdir()} == {f"attention_entropy.{ending}" for ending in ("png", "csv", "json")}
    return pd.read_csv(out / "attention_entropy.csv"), json.loads((out / "attention_entropy.json").read_text())


def test_the_table_is_that_of_the_softmax(shown: tuple[pd.DataFrame, dict]) -> None:
    table, _ = shown
    model = load_model("demo")
    x = torch.stack([model.preprocessing(photograph) for photograph in sample_photographs(4)])
    attention = expected_attention(model, x)[:, :, :, 1:]
    entropy = -(attention * np.log(attention)).sum(-1).mean(axis=(1, 3))
    np.testing.assert_allclose(table.entropy, entropy.ravel(), atol=1e-4)
    np.testing.assert_allclose(table.prefix_mass, attention[..., 0].mean(axis=(1, 3)).ravel(), atol=1e-5)
    assert set(table.num_images) == {4}
    assert set(table.uniform_entropy.round(4)) == {round(np.log(65), 4)}


def test_the_finding_follows_from_the_table(shown: tuple[pd.DataFrame, dict]) -> None:
    table, kept = shown
    first, last = table[table.layer < 3], table[table.layer > 5]
    ranges = [np.mean([group.max() - group.min() for _, group in part.groupby("layer").entropy]) for part in (first, last)]
    broadest, clear = (first.entropy / first.uniform_entropy).max(), np.log(65) / 10
    holds = last.entropy.mean() - first.entropy.mean() > clear and ranges[1] < ranges[0] > clear
    assert kept["as_published"] == holds
    correlation = np.corrcoef(table.entropy, table.distance)[0, 1]
    for number in (
        f"from {first.entropy.mean():.2f} to {last.entropy.mean():.2f} nats",
        f"from {ranges[0]:.2f} to {ranges[1]:.2f}",
        f"has {broadest:.0%} of the entropy of uniform attention",
        f"Over all 54 heads, entropy and distance correlate at {correlation:.2f}",
    ):
        assert number in kept["finding"]
    assert kept["provenance"]["model"]["name"] == "demo"


# Of six layers of two heads; uniform attention has an entropy of 4.
AS_PUBLISHED = [[0.5, 3.7], [1, 3], [1, 3], [2, 3], [3, 3.5], [3.4, 3.8]]


def heads(entropies: list[list[float]]) -> pd.DataFrame:
    layer, head = (index.ravel() for index in np.indices((len(entropies), 2)))
    columns = {"layer": layer, "head": head, "entropy": np.ravel(entropies), "uniform_entropy": 4.0}
    return pd.DataFrame(columns | {"distance": 10 * np.ravel(entropies)})


@pytest.mark.parametrize(
    ("what", "entropies", "holds"),
    [
        ("as published", AS_PUBLISHED, True),
        ("no larger at the end", [*AS_PUBLISHED[:4], [0.9, 1.2], [0.9, 1.2]], False),
        ("as wide apart at the end", [*AS_PUBLISHED[:4], [1.5, 4], [0.5, 4]], False),
        ("hardly larger at the end", [*AS_PUBLISHED[:4], [2.2, 2.6], [2.2, 2.6]], False),
        ("heads of early layers are alike", [[2.0, 2.3], [2.0, 2.3], [1, 3], [2, 3], [3, 3.2], [3.3, 3.4]], False),
    ],
)
def test_each_criterion_decides(what: str, entropies: list[list[float]], holds: bool) -> None:
    assert found(heads(entropies)).holds is holds, what


def test_one_layer_or_one_head_leaves_questions_open() -> None:
    assert found(heads([[0.5, 3.7]])).lines()[0].startswith("open")
    assert found(heads([[0.5, 3.7]])).lines()[2].startswith("open")
    one = heads(AS_PUBLISHED)
    assert [line.partition(":")[0] for line in found(one[one["head"] == 0]).lines()] == ["yes", "open", "open"]


def test_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """If attention is uniform in all layers, entropy does not rise and heads do not differ."""
    model = classifier(depth=1)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:96].mul_(1e-3)  # queries and keys
    checkpoint = save_model(model, tmp_path / "even.safetensors")
    arguments = ["--model", checkpoint, "--limit", 4, "--out", tmp_path / "out", "--format", "svg"]
    assert typed(monkeypatch, main, *arguments) == 0
    printed = capsys.readouterr().out
    assert "(not as published)" in printed
    table = pd.read_csv(tmp_path / "out" / "attention_entropy.csv")
    np.testing.assert_allclose(table.entropy, np.log(17), rtol=1e-5)
    assert "has 100% of the entropy of uniform attention" in printed.replace("\n", " ")


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(monkeypatch, main, "--images", "nowhere.png", "--out", tmp_path) == 2
    assert "there is no image file or folder nowhere.png" in capsys.readouterr().err
