"""The Python of README.md and CONTRIBUTING.md runs as it stands there, without the network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import vit_probe.checkpoints
from benchmarks.report import read_other_cases, side_by_side
from tests.checkpoints.parity import randomize
from vit_probe.measures.base.discovery import measure_files

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
CONTRIBUTIONS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.DOTALL
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the Hub: small random models of the same architectures; lists what was fetched."""
    import timm
    from timm.models import save_for_hf
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    torch.manual_seed(0)
    size = dict(embed_dim=48, depth=2, num_heads=3, img_size=64)
    dinov3 = randomize(timm.create_model("vit_small_patch16_dinov3", **size))
    save_for_hf(dinov3, tmp_path / "dinov3", model_args=size)
    tower = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96)
    config = SiglipConfig(text_config=tower | {"vocab_size": 50}, vision_config=tower | {"image_size": 64, "patch_size": 16})
    randomize(SiglipModel(config)).save_pretrained(tmp_path / "siglip")
    SiglipImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "siglip")
    fetched: list[str] = []

    def fetch(name: str) -> Path:
        fetched.append(name)
        return tmp_path / ("dinov3" if "dinov3" in name else "siglip")

    monkeypatch.setattr(vit_probe.checkpoints, "fetch", fetch)
    return fetched


def test_there_are_scripts_to_run() -> None:
    assert len(SCRIPTS) == 4
    marks = ('load_model("demo")', "per_image=True", "dinov3", "attention_hooks(model")
    for script, mark in zip(SCRIPTS, marks, strict=True):
        assert mark in script


def test_two_libraries_with_the_same_three_lines(
    hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (script,) = [script for script in SCRIPTS if "dinov3" in script]
    assert len(script.strip().splitlines()) < 15
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    assert len(hub) == 2
    assert {path.name for path in tmp_path.glob("*.png")} == {"Eva.png", "SiglipVisionModel.png"}
    assert capsys.readouterr().out.count("mean distance (pixels)") == 2


@pytest.mark.parametrize("script", [script for script in SCRIPTS if "dinov3" not in script])
def test_the_other_scripts(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    assert bool(list(tmp_path.glob("*.png"))) is ("savefig" in script)


@pytest.mark.parametrize("script", CONTRIBUTIONS)
def test_the_measures_that_contributors_are_shown(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(script.splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    assert bool(list(tmp_path.glob("*.png"))) is ("savefig" in script)
    assert "head" in capsys.readouterr().out


def test_every_measure_stands_in_the_table() -> None:
    for one in measure_files().values():
        assert f"| `{one.function}` |" in README


def test_what_it_costs_is_what_was_measured() -> None:
    newest = max((Path(__file__).parents[1] / "benchmarks" / "results").glob("cpu-????-??-??.csv"))
    rows = read_other_cases(newest.with_suffix(""), [])
    assert side_by_side(rows) in README
    assert newest.with_suffix(".md").name in README
    assert f"{max(row.repeats for row in rows)} repeats" in README
