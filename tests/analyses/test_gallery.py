"""The gallery's page: the part between the markers, and the rest, which stays."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from analyses.gallery import BEGIN, END, STUDIES, main, page, section
from tests.analyses.conftest import typed
from vit_probe import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of the studies; the first is not as published."""
    for place, name in enumerate(STUDIES):
        model = {"name": f"model {place}", "weights_sha256": f"{place}123456789"}
        kept = {
            "finding": f"{name} found {place}.",
            "as_published": [False, None, True][min(place, 2)],
            "published": ["yes: this", "no: that"],
            "provenance": {"one": {"model": model}, "two": model},
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(kept), encoding="utf-8")
    return tmp_path


def test_every_study_is_between_the_markers_and_the_rest_stays(folder: Path) -> None:
    text = page(f"before\n{BEGIN}\nwhat stood here\n{END}\nafter\n", folder)
    assert text.startswith(f"before\n{BEGIN}\n\n### Attention distance\n")
    assert text.endswith(f"\n\n{END}\nafter\n")
    assert "what stood here" not in text
    places = [text.index(f"![{name.replace('_', ' ').capitalize()}]({name}.png)") for name in STUDIES]
    assert places == sorted(places)
    assert page(text, folder) == text


def test_a_section_has_the_verdict_the_finding_and_the_weights(folder: Path) -> None:
    first, second = (section(name, folder) for name in STUDIES[:2])
    assert f"**Not as published.** {STUDIES[0]} found 0. Numbers: [{STUDIES[0]}.csv]({STUDIES[0]}.csv)." in first
    assert " Weights: `model 0` (01234567).\n" in first
    assert "**Undecided.**" in second
    assert second.endswith("\n\n- yes: this\n- no: that")
    assert "**As published.**" in section(STUDIES[2], folder)
    (folder / f"{STUDIES[1]}_more.png").touch()
    (folder / f"{STUDIES[1]}_more.csv").touch()
    third = section(STUDIES[1], folder)
    assert f"({STUDIES[1]}.png)\n\n![" in third
    assert f"({STUDIES[1]}_more.png)" in third
    assert f"[{STUDIES[1]}.csv]({STUDIES[1]}.csv), [{STUDIES[1]}_more.csv]({STUDIES[1]}_more.csv)." in third
    assert f"    python -m analyses.{STUDIES[1]} --model demo" in second


@pytest.mark.parametrize("name", STUDIES)
def test_the_docstring_of_a_study(name: str) -> None:
    title, _, rest = (import_module(f"analyses.{name}").__doc__ or "").partition("\n\n")
    assert title.endswith(".")
    assert "arXiv:" in rest
    assert f"    python -m analyses.{name} " in rest


def test_the_page_is_there_and_has_its_markers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no .*README.md; run this in the root of a clone"):
        main(out=tmp_path)
    for text in (BEGIN, f"{BEGIN} {BEGIN} {END}", f"{END} {BEGIN}"):
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        with pytest.raises(
            InputError, match=r"README.md must contain <!-- studies --> and <!-- /studies --> once each, in this"
        ):
            main(out=tmp_path)


def test_the_page_in_the_clone_is_of_the_results_beside_it() -> None:
    figures = Path(__file__).parents[2] / "figures"
    text = (figures / "README.md").read_text(encoding="utf-8")
    assert page(text, figures) == text


@pytest.mark.parametrize("name", [*STUDIES, "gallery", "train_demo", "train_variants", "finetune_resolution"])
def test_help_is_the_docstring_of_the_module(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_module(f"analyses.{name}")
    assert typed(monkeypatch, module.main, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for paragraph in (module.__doc__ or "").split("\n\n"):
        assert " ".join(paragraph.split()) in shown
