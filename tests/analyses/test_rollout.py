"""The rollout study: its numbers against literal versions, and the finding that follows from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from analyses import rollout
from analyses.rollout import main
from tests.analyses.conftest import typed
from tests.example_models import classifier, expected_attention, small_vit
from tests.measures.test_deletion import literal
from tests.reference import rollout as literal_rollout
from tests.reference import rollout_map
from vit_probe import Preprocessing, VisionTransformer, sample_photographs, save_model
from vit_probe.cli.study import StudyOptions

AREAS = ["area, most rollout", "area, most class attention", "area, least rollout", "area, random"]


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    model = classifier(3)
    model.preprocessing = Preprocessing((32, 32), resize=32)
    with torch.no_grad():  # a head that distinguishes classes
        model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(model: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(model, tmp_path_factory.mktemp("model") / "model.safetensors")


def kept(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    assert (folder / "rollout.png").stat().st_size > 10_000
    return pd.read_csv(folder / "rollout.csv"), json.loads((folder / "rollout.json").read_text())


def test_every_number_and_the_finding(model: VisionTransformer, checkpoint: Path, tmp_path: Path) -> None:
    main(StudyOptions(model=str(checkpoint), out=tmp_path, limit=5))
    table, content = kept(tmp_path)
    x = torch.stack([model.preprocessing(photograph) for photograph in sample_photographs(5)])  # type: ignore[misc]
    attention = expected_attention(model, x)
    heads = attention[-1, :, :, 0, 1:].reshape(5, 4, 4, 4)
    rolled = rollout_map(literal_rollout(attention, "mean", 0.0, has_cls_token=True), 4, 4, 1, True)
    assert table.name.tolist() == ["china", "flower", "grace_hopper", "china, crop 1", "flower, crop 1"]
    for image, row in enumerate(table.itertuples()):
        pairs = np.corrcoef(heads[image].reshape(4, 16))[np.triu_indices(4, 1)]
        assert row.heads_correlation == pytest.approx(pairs.mean(), abs=1e-4)
        together = np.corrcoef(heads[image].mean(axis=0).ravel(), rolled[image].ravel())[0, 1]
        assert row.rollout_correlation == pytest.approx(together, abs=1e-4)
        descending = np.sort(rolled[image].ravel())[::-1].cumsum()
        assert row.rollout_patches == (np.searchsorted(descending, 0.6 * descending[-1]) + 1) / 16
    counts = list(range(0, 17, 2))
    for name, maps in (("most rollout", rolled), ("least rollout", -rolled), ("most class attention", heads.mean(axis=1))):
        curves = literal(model, x, maps, (8, 8), counts)
        areas = (curves[:, 1:] + curves[:, :-1]).mean(axis=1) / 2
        np.testing.assert_allclose(table[f"area, {name}"], areas, atol=1e-5)
    photographs = [table.iloc[[0, 3]], table.iloc[[1, 4]], table.iloc[[2]]]

    def mean(column: str) -> Any:
        return np.mean([part[column].mean() for part in photographs])

    differences = {}
    for order in ("random", "least rollout"):
        less = [(part[f"area, {order}"] - part["area, most rollout"]).mean() for part in photographs]
        interval = np.std(less, ddof=1) / 3**0.5 * 4.302653  # Student's t for 2 degrees of freedom
        differences[order] = np.mean(less), interval
    answers = [answer.partition(":")[0] for answer in content["published"]]
    assert answers[0] == ("yes" if mean("heads_correlation") < 0.5 and mean("heads_patches") < 0.3 else "no")
    for answer, (difference, interval) in zip(answers[1:], differences.values(), strict=True):
        assert answer == ("open" if abs(difference) <= interval else "yes" if difference > 0 else "no")
    finding = content["finding"]
    for part in (
        f"two heads of layer 2 correlate at {mean('heads_correlation'):.2f},",
        f"the mean of all heads at {mean('rollout_correlation'):.2f};",
        f"lies on {100 * mean('heads_patches'):.0f} % of",
        f"60 % of rollout on {100 * mean('rollout_patches'):.0f} %,",
        f"predicted class is {mean('area, most rollout'):.3f} if those with most rollout",
        "{:.3f} ± {:.3f} higher in random order and".format(*differences["random"]),
        "{:.3f} ± {:.3f} higher if those with least rollout go first (mean and 95 % interval, photographs: 3)".format(
            *differences["least rollout"]
        ),
    ):
        assert part in finding
    assert content["provenance"]["layers"][-1] == "blocks.2.attn"
    assert (tmp_path / "rollout_deletion.png").is_file()


@pytest.mark.parametrize(
    ("threshold", "few", "more", "answers", "holds"),
    [
        (2.0, 1.0, {"random": 0.5, "least rollout": 0.5}, ["yes", "yes", "yes"], True),
        (-2.0, 1.0, {"random": 0.5, "least rollout": 0.5}, ["no", "yes", "yes"], False),
        (2.0, 0.0, {"random": 0.5, "least rollout": 0.5}, ["no", "yes", "yes"], False),
        (2.0, 1.0, {"random": -0.5, "least rollout": 0.5}, ["yes", "no", "yes"], False),
        (2.0, 1.0, {"random": 0.5, "least rollout": 0.0}, ["yes", "yes", "open"], None),
    ],
)
def test_each_criterion_decides(
    threshold: float,
    few: float,
    more: dict[str, float],
    answers: list[str],
    holds: bool | None,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The curves of the other orders are that of most rollout plus a constant, larger in one image than in the other."""
    real = rollout.deletion

    def changed(*arguments: Any) -> Any:
        result = real(*arguments)
        first = result.probability[result.orders.index("most rollout")]
        for order, later in more.items():
            result.probability[result.orders.index(order)] = first + later * np.array([[1.0], [1.1]])
        return result

    monkeypatch.setattr(rollout, "DIFFERENT", threshold)
    monkeypatch.setattr(rollout, "FEW", few)
    monkeypatch.setattr(rollout, "deletion", changed)
    main(StudyOptions(model=str(checkpoint), out=tmp_path, limit=2))
    study = kept(tmp_path)[1]
    assert [answer.partition(":")[0] for answer in study["published"]] == answers
    assert study["as_published"] is holds


def test_one_photograph_has_no_interval(checkpoint: Path, tmp_path: Path) -> None:
    main(StudyOptions(model=str(checkpoint), out=tmp_path, limit=1))
    study = kept(tmp_path)[1]
    assert "nan" not in study["finding"]
    assert study["as_published"] is None or study["published"][0].startswith("no")
    assert [answer.partition(":")[0] for answer in study["published"][1:]] == ["open", "open"]


def test_the_same_input_gives_the_same_bytes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        assert typed(monkeypatch, main, "--model", checkpoint, "--limit", 4, "--out", tmp_path / name) == 0
    assert "the maps of two heads of layer 2 correlate at" in capsys.readouterr().out
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["rollout.csv", "rollout.json", "rollout.png", "rollout_deletion.csv", "rollout_deletion.png"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_model_without_classifier_is_judged_by_its_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    headless = small_vit(num_classes=0, num_heads=4)
    headless.preprocessing = Preprocessing((24, 24), resize=24)
    (tmp_path / "rollout_deletion.png").touch()  # of an earlier model
    main(StudyOptions(model=str(save_model(headless, tmp_path / "headless.safetensors")), out=tmp_path, limit=3))
    assert "note: deletion is left out: VisionTransformer does not return scores of classes" in capsys.readouterr().err
    table, content = kept(tmp_path)
    assert not set(AREAS) & set(table)
    assert [answer.partition(":")[0] for answer in content["published"]][1:] == ["open", "open"]
    few, apart = table.heads_patches.mean() < 0.3, table.heads_correlation.mean() < 0.5
    assert content["as_published"] is (None if few and apart else False)
    assert "No patches were deleted, because the model predicts no classes" in content["finding"]
    assert not (tmp_path / "rollout_deletion.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "nowhere.jpg"], "there is no image file or folder nowhere.jpg"),
        (["--model", "nowhere.pt"], "there is no checkpoint file or folder nowhere.pt"),
    ],
)
def test_missing_files(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, main, "--out", tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_class_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = small_vit(class_token=False, pooling="avg")
    bare.preprocessing = Preprocessing((24, 24), resize=24)
    path = save_model(bare, tmp_path / "bare.safetensors")
    assert typed(monkeypatch, main, "--model", path, "--out", tmp_path, "--limit", 2) == 2
    assert "has no class token whose attention could be shown" in capsys.readouterr().err
