"""The command `vit-probe`, run as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from vit_probe import VisionTransformer, ViTConfig, cli, load_model, load_result, mean_attention_distance

COMMAND = [sys.executable, "-c", "from vit_probe.cli import main; main()"]
ANALYSES = ("attention_distance", "patch_filters", "position_similarity", "rollout")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random ViT as a state dict."""
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(image_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=5))
    path = tmp_path_factory.mktemp("model") / "small.pt"
    torch.save({name: value * 3 for name, value in model.state_dict().items()} | {"norm.weight": torch.ones(48)}, path)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for index in range(5):
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(autouse=True)
def _known_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small model's width tells no number of heads; the command loads it as Python would, with num_heads=4."""
    monkeypatch.setattr(cli, "_load", lambda name: load_model(name, num_heads=4))


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `vit-probe ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["vit-probe", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def test_figures(
    checkpoint: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "figures"
    formats = ["--format", "png", "--format", "pdf", "--format", "svg"]
    arguments = ["figures", "--model", checkpoint, "--images", photographs, "--out", out, "--batch-size", 2, *formats]
    code, printed, err = run(capsys, monkeypatch, *arguments)
    assert code == 0
    pictures = {f"{name}.{ending}" for name in (*ANALYSES, "figure7") for ending in ("png", "pdf", "svg")}
    numbers = {f"{name}.{ending}" for name in ANALYSES for ending in ("csv", "safetensors")}
    assert {path.name for path in out.iterdir()} == pictures | numbers | {"run.json"}
    for name in pictures | numbers:
        assert str(out / name) in printed
    expected = mean_attention_distance(load_model(checkpoint, num_heads=4), photographs)
    frame = pd.read_csv(out / "attention_distance.csv")
    pd.testing.assert_frame_equal(frame, expected.to_dataframe(), rtol=1e-6)
    saved = load_result(out / "attention_distance.safetensors")
    assert saved.provenance["images"] == expected.provenance["images"]
    record = json.loads((out / "run.json").read_text())
    assert record["model"]["name"] == "small.pt"
    assert record["images"]["names"] == [f"{index}.png" for index in range(5)]
    assert "ImageNet's mean and standard deviation are assumed" in err
    assert record["files"] == sorted(pictures | numbers)


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (["distance", "--spread", "--prefix", "drop"], ["attention_distance"]),
        (["distance", "--sorted-layer", "0", "--sorted-layer", "2"], ["attention_distance", "attention_distance_sorted"]),
        (["rollout", "--head-fusion", "max", "--discard-ratio", "0.5", "--kind", "heatmap", "--count", "2"], ["rollout"]),
    ],
)
def test_one_analysis_of_images(
    arguments: list[str],
    files: list[str],
    checkpoint: Path,
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A shell's wildcard leaves several paths after one --images.
    paths = ["--images", photographs / "0.png", photographs / "3.png", photographs / "4.png"]
    code, _, err = run(capsys, monkeypatch, *arguments, "--model", checkpoint, "--out", tmp_path, "--limit", 2, *paths)
    assert code == 0, err
    extra = [f"{files[0]}.csv", f"{files[0]}.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*(f"{name}.png" for name in files), *extra])
    result = load_result(tmp_path / f"{files[0]}.safetensors")
    assert result.provenance["images"]["names"] == ["0.png", "3.png"]
    options = dict(zip(arguments[1::2], arguments[2::2], strict=False))
    if arguments[0] == "rollout":
        assert result.provenance["options"] == {"head_fusion": "max", "discard_ratio": 0.5}
    else:
        assert result.provenance["options"] == {"prefix": "drop" if "drop" in arguments else "renormalize"}, options


@pytest.mark.parametrize(
    ("arguments", "name", "rows"),
    [(["filters", "--components", "9"], "patch_filters", 9 * 3 * 8 * 8), (["positions"], "position_similarity", 16 * 16)],
)
def test_one_analysis_of_weights(
    arguments: list[str],
    name: str,
    rows: int,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, _, err = run(capsys, monkeypatch, *arguments, "--model", checkpoint, "--out", tmp_path)
    assert code == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.{ending}" for ending in ("csv", "png", "safetensors")]
    assert len(pd.read_csv(tmp_path / f"{name}.csv")) == rows


def test_sample_photographs_without_images(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, printed, _ = run(capsys, monkeypatch, "rollout", "--model", checkpoint, "--out", tmp_path, "--limit", 4)
    assert code == 0
    assert "china, crop 1" in printed
    assert load_result(tmp_path / "rollout.safetensors").provenance["images"]["count"] == 4


def test_models_lists_what_can_be_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, printed, _ = run(capsys, monkeypatch, "models")
    assert code == 0
    for name in (".npz", ".safetensors", "FOLDER", "hf:ORG/NAME", "timm:NAME"):
        assert name in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["figures"], "name a model with --model"),
        (["distance", "--prefix", "neither"], "'neither' is not one of 'renormalize', 'drop'"),
        (["rollout", "--head-fusion", "median"], "'median' is not one of"),
        (["rollout", "--model", "MODEL", "--discard-ratio", "1"], r"--discard-ratio must lie in [0, 1), got 1.0"),
        (["rollout", "--model", "MODEL", "--count", "65"], "--count must be at most 64, got 65"),
        (["distance", "--model", "MODEL", "--sorted-layer", "3"], "--sorted-layer 3: the model has layers 0 to 2"),
        (["filters", "--model", "MODEL", "--components", "48"], "so 1 to 47 principal components; got components=48"),
        (["figures", "--model", "MODEL", "--format", "gif"], "'gif' is not one of 'png', 'pdf', 'svg'"),
        (["figures", "--model", "MODEL", "--limit", "0"], "--limit"),
        (["figures", "--model", "MODEL", "--device", "abacus"], "no device 'abacus' can be used here"),
        (["figures", "--model", "nowhere.pt"], "there is no checkpoint file or folder nowhere.pt"),
        (["figures", "--model", "MODEL", "--images", "nowhere.png"], "there is no image file or folder nowhere.png"),
        (["figures", "--model", "MODEL", "--images", "TEXT"], "text.png is not an image that can be read"),
        (["figures", "--model", "MODEL", "--images", "TRUNCATED"], "truncated.png cannot be decoded"),
        (["figures", "--model", "MODEL", "--out", "TEXT"], "cannot write into the folder"),
        (["nothing"], "No such command 'nothing'"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    sentence: str,
    checkpoint: Path,
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "truncated.png").write_bytes((photographs / "0.png").read_bytes()[:2000])
    names = {"MODEL": checkpoint, "TEXT": tmp_path / "text.png", "TRUNCATED": tmp_path / "truncated.png"}
    monkeypatch.chdir(tmp_path)
    code, printed, err = run(capsys, monkeypatch, *(names.get(argument, argument) for argument in arguments))
    assert code == 2
    assert sentence in err
    (line,) = [line for line in err.splitlines() if "note: " not in line]
    assert line.startswith("vit-probe: ")
    assert printed == ""
    assert not list(tmp_path.rglob("*.csv"))


def test_a_defect_is_not_passed_off_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vit-probe", "models"])
    monkeypatch.setattr(cli, "terminal", None)
    with pytest.raises(AttributeError):
        cli.main()


def test_files_already_written_stay_whole(
    checkpoint: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["distance", "--model", checkpoint, "--out", tmp_path, "--images", photographs]
    assert run(capsys, monkeypatch, *arguments)[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (photographs / "zz.png").write_bytes(b"broken")
    try:
        assert run(capsys, monkeypatch, *arguments)[0] == 2
    finally:
        (photographs / "zz.png").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_same_run_gives_the_same_bytes(
    checkpoint: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        arguments = ["figures", "--model", checkpoint, "--images", photographs, "--out", tmp_path / name, "--format", "pdf"]
        assert run(capsys, monkeypatch, *arguments)[0] == 0
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_the_installed_command_answers_before_torch_could_load() -> None:
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        answer = subprocess.run(
            [*COMMAND, "--help"], capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "100"}
        )
        best = min(best, time.perf_counter() - start)
    assert "figures" in answer.stdout
    assert best < 0.7
