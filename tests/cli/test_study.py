"""What studies take from the command line."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from vit_probe import InputError
from vit_probe.cli.options import StudyOptions, with_options
from vit_probe.cli.study import load, run_study, single_command

CALLS: list[tuple[Any, ...]] = []


@dataclass(frozen=True, kw_only=True)
class Group:
    first: Annotated[int, typer.Option(min=1, help="A number.")] = 1
    second: str = "two"


def study(options: Group, own: Annotated[str, typer.Option(help="Its own.")] = "own") -> None:
    CALLS.append((options, own))


def call(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["study", *arguments])
    with pytest.raises(SystemExit) as end:
        run_study(study)
    return int(end.value.code or 0)


def test_a_group_of_options_is_spelt_out_and_comes_as_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    assert call(["--first", "3", "--own", "mine"], monkeypatch) == 0
    assert call([], monkeypatch) == 0
    assert [(Group(first=3), "mine"), (Group(), "own")] == CALLS


def test_help_is_that_of_the_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--help"], monkeypatch) == 0
    printed = capsys.readouterr().out
    for text in ("What studies take from the command line.", "--first", "A number.", "--second", "--own"):
        assert text in printed


def test_a_wrong_option_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--first", "0"], monkeypatch) == 2
    assert capsys.readouterr().err.startswith("vit-probe: Invalid value for '--first'")


def test_the_model_is_loaded_last(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.png"):
        load(StudyOptions(model="nowhere.pt", images=[tmp_path / "nowhere.png"], out=tmp_path))
    model, photographs = load(StudyOptions(limit=2, out=tmp_path / "new"))
    assert (type(model).__name__, len(photographs)) == ("VisionTransformer", 2)
    assert (tmp_path / "new").is_dir()


def test_commands_keep_their_signature() -> None:
    parameters = single_command(with_options(study)).registered_commands[0].callback.__signature__.parameters  # type: ignore[union-attr]
    assert list(parameters) == ["first", "second", "own"]
