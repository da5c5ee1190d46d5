"""Maps of models that differ in their positions alone, and what is said of their accuracies."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analyses import position_similarity
from analyses.position_similarity import KINDS, main
from analyses.train_variants import FOLDER, VARIANTS
from tests import reference
from tests.analyses.conftest import typed
from tests.analyses.small_models import write_model
from vit_probe import InputError, load_model
from vit_probe.cli.study import WeightsStudyOptions

TOP1 = {"none": 25.0, "learned_1d": 31.0, "learned_2d": 30.0, "sincos_2d": 29.0, "relative": 30.5, "hybrid": 35.0}


def write_variants(folder: Path, top1: dict[str, float] = TOP1, images: int = 2000) -> Path:
    """Models with random weights, and a table that claims accuracies for them."""
    folder.mkdir(exist_ok=True)
    rows = []
    for name, kind in VARIANTS.items():
        write_model(folder / f"{name}.safetensors", kind["position"], kind["stem"])
        rows.append(dict(variant=name, **kind, epochs=8, parameters=9, top1=top1[name], top5=60.0, images=images, command="c"))
    pd.DataFrame(rows).to_csv(folder / "variants.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_variants(tmp_path_factory.mktemp("variants"))


def test_a_kind_without_a_table_has_no_map(variants: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    draw = position_similarity.plot_position_similarities
    monkeypatch.setattr(
        position_similarity, "plot_position_similarities", lambda maps: figures.append(draw(maps)) or figures[0]
    )
    main(WeightsStudyOptions(out=tmp_path), variants=variants)
    panels = figures[0].axes[: 1 + len(KINDS)]
    assert [panel.get_title() for panel in panels[1:]] == [
        "no positions\n25.0 % top-1",
        "learned 1-D\n31.0 % top-1",
        "learned 2-D\n30.0 % top-1",
        "relative\n30.5 % top-1",
        "sine-cosine\n29.0 % top-1",
    ]
    absent = [panel for panel in panels if not panel.images]
    assert [panel.get_title().partition("\n")[0] for panel in absent] == ["no positions", "relative"]
    assert [[text.get_text() for text in panel.texts] for panel in absent] == [["No table\nto compare"]] * 2


def result(out: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    table = pd.read_csv(out / "position_similarity.csv", index_col="model", keep_default_na=False, na_values=[""])
    return table, json.loads((out / "position_similarity.json").read_text())


def test_the_numbers_are_those_of_the_tables(variants: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(WeightsStudyOptions(out=tmp_path), variants=variants)
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"position_similarity.{ending}" for ending in ("png", "csv", "json")),
        "position_similarity_maps.csv",
    }
    table, kept = result(tmp_path)
    assert list(table.index) == ["model", *KINDS]
    assert table.nearness[["none", "relative"]].isna().all()
    pairs = pd.read_csv(tmp_path / "position_similarity_maps.csv")
    places = [(row, col) for row in range(4) for col in range(4)]
    for name in ("learned_1d", "learned_2d", "sincos_2d"):
        positions = load_model(variants / f"{name}.safetensors").position_table()[0].detach().numpy()
        expected = reference.position_similarity(positions, 4, 4)
        np.testing.assert_allclose(pairs.similarity[pairs.model == name], expected.ravel(), atol=1e-3)
        apart = [(math.dist(one, other), expected[one + other]) for one in places for other in places if one != other]
        assert table.nearness[name] == pytest.approx(np.corrcoef(np.transpose(apart))[0, 1], abs=1e-4)
        share = TOP1[name] / 100
        assert table.standard_error[name] == pytest.approx(100 * math.sqrt(share * (1 - share) / 2000), rel=1e-4)
    assert len(pairs) == 64**2 + 3 * 16**2
    assert kept["as_published"] is True
    assert f"correlate at {table.nearness['model']:.2f}" in kept["finding"]
    assert (
        "25.0 % top-1, 5.5 points below the mean of the paper's three kinds, more than two standard errors (2.4)"
        in kept["finding"]
    )
    assert "Those lie 1.0 apart: learned 1-D 31.0 %, learned 2-D 30.0 %, relative 30.5 %. Sine-cosine" in kept["finding"]
    assert "Sine-cosine positions have 29.0 %." in kept["finding"]
    assert set(kept["provenance"]) == {"model", *KINDS}
    assert f"{kept['finding']} (as published)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "images", "said", "holds"),
    [
        (
            {"none": 29.0},
            2000,
            "1.5 points below the mean of the paper's three kinds, no more than two standard errors (2.4).",
            None,
        ),
        (
            {"none": 36.0},
            2000,
            "-5.5 points below the mean of the paper's three kinds, more than two standard errors (2.5).",
            False,
        ),
        ({"relative": 36.0}, 2000, "Those lie 6.0 apart:", False),
        ({"relative": 34.0}, 2000, "Those lie 4.0 apart:", False),
        ({"relative": 34.0}, 1000, "Those lie 4.0 apart:", None),
        ({"sincos_2d": 39.0}, 2000, "Those lie 1.0 apart:", True),
        ({}, 100, "5.5 points below the mean of the paper's three kinds, no more than two standard errors (10.7).", None),
    ],
)
def test_small_gaps_are_not_overread(
    changed: dict[str, float], images: int, said: str, holds: bool | None, tmp_path: Path
) -> None:
    main(WeightsStudyOptions(out=tmp_path), variants=write_variants(tmp_path / "variants", TOP1 | changed, images))
    kept = result(tmp_path)[1]
    assert said in kept["finding"]
    assert kept["as_published"] is holds


def test_a_model_whose_positions_tell_nothing_is_not_as_published(variants: Path, tmp_path: Path) -> None:
    main(WeightsStudyOptions(model=str(variants / "learned_1d.safetensors"), out=tmp_path), variants=variants)
    kept = result(tmp_path)[1]
    assert kept["finding"].startswith("In learned_1d.safetensors, similarity and distance correlate at ")
    assert kept["as_published"] is False


def test_as_it_is_typed(variants: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--variants", variants, "--out", tmp_path, "--format", "png", "--format", "pdf"]
    assert typed(monkeypatch, main, *arguments) == 0
    first = (tmp_path / "position_similarity.pdf").read_bytes()
    assert typed(monkeypatch, main, *arguments) == 0
    assert (tmp_path / "position_similarity.pdf").read_bytes() == first


def test_what_is_missing_is_named(
    variants: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, main, "--variants", tmp_path, "--out", tmp_path) == 2
    message = f"there is no {tmp_path}/variants.csv; `python -m analyses.train_variants DATA` makes it"
    assert message in capsys.readouterr().err
    pd.read_csv(variants / "variants.csv").iloc[:3].to_csv(tmp_path / "variants.csv", index=False)
    with pytest.raises(InputError, match="lacks relative, sincos_2d, hybrid; rerun the command that started it"):
        main(WeightsStudyOptions(out=tmp_path), variants=tmp_path)


def test_the_gallery_s_models_show_nearness(tmp_path: Path) -> None:
    """In the models that come with the repository, near patches have like positions."""
    main(WeightsStudyOptions(out=tmp_path), variants=FOLDER)
    table, kept = result(tmp_path)
    assert table.nearness["model"] < -0.5
    assert (table.nearness[["learned_1d", "learned_2d", "sincos_2d"]] < -0.2).all()
    assert set(table.images.dropna()) == {2000}
    assert f"{table.top1['none']:.1f} % top-1" in kept["finding"]
