"""The command `vit-probe`, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import vit_probe
from tests.example_models import classifier, transformers_vit
from vit_probe import (
    VisionTransformer,
    ViTConfig,
    attention_entropy,
    attention_rollout,
    load_model,
    load_result,
    mean_attention_distance,
    save_model,
)
from vit_probe.cli import commands as cli
from vit_probe.cli import console as terminal
from vit_probe.measures.base.discovery import measure_files
from vit_probe.results import Result, weights_sha256

COMMAND = [sys.executable, "-c", "from vit_probe.cli.commands import main; main()"]
ANALYSES = ("attention_distance", "patch_filters", "position_similarity", "rollout")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random ViT that says everything about itself but how photographs are prepared."""
    return save_model(classifier(depth=3), tmp_path_factory.mktemp("model") / "small.safetensors")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for index in range(5):
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


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
    expected = mean_attention_distance(load_model(checkpoint), photographs)
    frame = pd.read_csv(out / "attention_distance.csv")
    pd.testing.assert_frame_equal(frame, expected.to_dataframe(), rtol=1e-6)
    saved = load_result(out / "attention_distance.safetensors")
    assert saved.provenance["images"] == expected.provenance["images"]
    record = json.loads((out / "run.json").read_text())
    assert record["model"]["name"] == "small.safetensors"
    assert record["images"]["names"] == [f"{index}.png" for index in range(5)]
    assert "ImageNet's mean and standard deviation are assumed" in err
    assert record["files"] == sorted(pictures | numbers)


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (["distance", "--spread", "--prefix", "drop"], ["attention_distance"]),
        (["distance", "--kind", "sorted", "--layers", "0,2"], ["attention_distance"]),
        (["entropy", "--spread"], ["attention_entropy"]),
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
    seen = [photographs / "0.png", photographs / "3.png"]
    if arguments[0] == "rollout":
        expected: Result = attention_rollout(load_model(checkpoint), seen, head_fusion="max", discard_ratio=0.5)
    elif arguments[0] == "entropy":
        expected = attention_entropy(load_model(checkpoint), seen)
    else:
        prefix: Any = "drop" if "drop" in arguments else "renormalize"
        expected = mean_attention_distance(load_model(checkpoint), seen, prefix=prefix)
    assert result.provenance == expected.provenance
    pd.testing.assert_frame_equal(result.to_dataframe(), expected.to_dataframe())


@pytest.mark.parametrize("name", [name for name, one in measure_files().items() if one.takes_images])
def test_every_measure_has_its_command(
    name: str,
    checkpoint: Path,
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = measure_files()[name]
    arguments = [one.command, "--model", checkpoint, "--images", photographs, "--out", tmp_path, "--batch-size", 5]
    code, printed, err = run(capsys, monkeypatch, *arguments)
    assert code == 0, err
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.{ending}" for ending in ("png", "csv", "safetensors")}
    expected = getattr(vit_probe, one.function)(load_model(checkpoint), photographs, batch_size=5)
    saved = load_result(tmp_path / f"{name}.safetensors")
    assert type(saved) is type(expected)
    assert saved.provenance == expected.provenance
    pd.testing.assert_frame_equal(saved.to_dataframe(), expected.to_dataframe())
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / f"{name}.csv"), expected.to_dataframe(), rtol=1e-6, check_dtype=False)
    for column in expected.summary().columns:
        assert column.split()[0] in printed


def test_the_values_of_every_image(
    checkpoint: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = ["local-mass", "--radius", "1", "--per-image"]
    arguments = ["--model", checkpoint, "--images", photographs, "--out", tmp_path]
    assert run(capsys, monkeypatch, *measure, *arguments)[0] == 0
    table = pd.read_csv(tmp_path / "local_mass_per_image.csv")
    assert table["name"].unique().tolist() == [f"{index}.png" for index in range(5)]
    means = table.groupby(["layer", "head"])["local_mass"].mean().to_numpy()
    np.testing.assert_allclose(means, pd.read_csv(tmp_path / "local_mass.csv")["local_mass"], rtol=1e-6)


def test_help_of_a_measure_tells_its_options(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, printed, _ = run(capsys, monkeypatch, "rollout", "--help")
    assert code == 0
    for text in (
        "How attention carries information from each patch",
        "--head-fusion",
        "<mean|max|min>",
        "--count",
        "Images per forward pass",
    ):
        assert text in printed


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


@pytest.mark.parametrize("command", ["figures", "distance", "filters", "positions"])
def test_without_a_model_the_bundled_one_is_taken(
    command: str, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [] if command in ("filters", "positions") else ["--images", photographs]
    code, _, err = run(capsys, monkeypatch, command, "--out", tmp_path, *arguments)
    assert (code, err) == (0, "")
    results = sorted(tmp_path.glob("*.safetensors"))
    assert len(results) == (4 if command == "figures" else 1)
    models = [load_result(path).provenance["model"] for path in results]
    assert all((model["name"], model["weights_sha256"]) == ("demo", weights_sha256(load_model("demo"))) for model in models)


def test_models_lists_what_can_be_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, printed, _ = run(capsys, monkeypatch, "models")
    assert code == 0
    for name in ("demo", ".npz", ".safetensors", "FOLDER", "hf:ORG/NAME", "timm:NAME"):
        assert name in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["distance", "--prefix", "neither"], "'neither' is not one of 'renormalize', 'drop'"),
        (["rollout", "--head-fusion", "median"], "'median' is not one of"),
        (["rollout", "--model", "MODEL", "--discard-ratio", "1"], "discard_ratio must lie in [0, 1), got 1.0"),
        (["rollout", "--model", "MODEL", "--count", "65"], "--count must be from 1 to 64, got 65"),
        (["rollout", "--model", "MODEL", "--count", "0"], "--count must be from 1 to 64, got 0"),
        (["distance", "--model", "MODEL", "--layers", "0,3"], "--layers 3: the model has layers 0 to 2"),
        (["distance", "--model", "MODEL", "--layers", "0-2"], "--layers must be whole numbers with commas between them"),
        (["filters", "--model", "MODEL", "--components", "0"], "components must be at least 1"),
        (["figures", "--model", "MODEL", "--format", "gif"], "'gif' is not one of 'png', 'pdf', 'svg'"),
        (["figures", "--model", "MODEL", "--limit", "0"], "--limit"),
        (["figures", "--model", "MODEL", "--device", "abacus"], "device 'abacus' is not available"),
        (["figures", "--model", "nowhere.pt"], "there is no checkpoint file or folder nowhere.pt"),
        (["figures", "--model", "MODEL", "--images", "nowhere.png"], "there is no image file or folder nowhere.png"),
        (["figures", "--model", "MODEL", "--images", "TEXT"], "text.png is not a readable image file"),
        (["figures", "--model", "MODEL", "--images", "TRUNCATED"], "truncated.png cannot be decoded"),
        (["figures", "--model", "MODEL", "--out", "TEXT"], "text.png as an output folder: File exists; choose another"),
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
    monkeypatch.setattr(terminal, "print_table", None)
    with pytest.raises(TypeError):
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


@pytest.mark.parametrize("command", [COMMAND, [sys.executable, "-m", "vit_probe"]])
def test_help(command: list[str]) -> None:
    answer = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "figures" in answer.stdout
    assert answer.stderr == ""


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, printed, err = run(capsys, monkeypatch)
    assert code == 2
    assert "figures" in printed
    assert err == ""


def test_what_was_assumed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = VisionTransformer(ViTConfig(image_size=32, patch_size=8, embed_dim=192, depth=1, num_heads=3, num_classes=0))
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    code, _, err = run(capsys, monkeypatch, "positions", "--model", tmp_path / "bare.pt", "--out", tmp_path)
    assert code == 0
    assert "note: the checkpoint does not say how many attention heads a layer has; 3 are assumed" in err
    assert "note: the checkpoint does not say how photographs are prepared" in err


def test_a_model_without_positions_gets_its_other_figures(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two pixels a patch: 12 weights a filter, so 12 components.
    config = ViTConfig(
        image_size=(16, 32), patch_size=2, embed_dim=32, depth=1, num_heads=2, class_token=False, pooling="avg", position="none"
    )
    checkpoint = save_model(VisionTransformer(config), tmp_path / "none.safetensors")
    out = tmp_path / "out"
    code, _, err = run(capsys, monkeypatch, "figures", "--model", checkpoint, "--images", photographs, "--out", out)
    assert code == 0, err
    assert "position similarity is left out: the tokens of a constant image are all alike after 1 layer" in err
    assert {path.stem for path in out.glob("*.png")} == {"attention_distance", "patch_filters", "rollout", "figure7"}
    assert json.loads((out / "run.json").read_text())["options"]["components"] == 12


# Models of other libraries


def _folder(model, path: Path) -> Path:  # type: ignore[no-untyped-def]
    """As transformers writes it, with the processor's configuration."""
    from transformers import ViTImageProcessor

    model.save_pretrained(path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def test_a_pooling_head_is_left_out_and_named(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformers_vit("SiglipVision", image_size=32)
    folder, out = _folder(model, tmp_path / "siglip"), tmp_path / "out"
    code, printed, err = run(capsys, monkeypatch, "distance", "--model", folder, "--images", photographs, "--out", out)
    assert code == 0, err
    assert "not in the table: the attention of head.attention (1 query for 16 keys)" in printed
    table = pd.read_csv(out / "attention_distance.csv")
    assert table[["layer", "head"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert load_result(out / "attention_distance.safetensors").provenance["skipped"].keys() == {"head.attention"}


def test_a_windowed_model_gets_its_distances_and_no_rollout(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import SwinConfig, SwinModel

    torch.manual_seed(0)
    sizes = dict(image_size=32, patch_size=4, window_size=4, embed_dim=16, depths=[2, 2], num_heads=[1, 2])
    folder, out = _folder(SwinModel(SwinConfig(**sizes)), tmp_path / "swin"), tmp_path / "out"
    code, printed, err = run(capsys, monkeypatch, "figures", "--model", folder, "--images", photographs, "--out", out)
    assert code == 0, err
    assert "rollout is left out: rollout needs attention over all tokens" in err
    assert "position similarity is left out: the tokens of a constant image are all alike" in err
    assert "windows" in printed
    table = pd.read_csv(out / "attention_distance.csv")
    assert table["num_windows"].tolist() == [4, 4, 1, 1, 1, 1]
    assert not (out / "rollout.png").exists()
    assert (out / "figure7.png").exists()
    code, _, err = run(capsys, monkeypatch, "rollout", "--model", folder, "--images", photographs, "--out", out)
    assert code == 2
    assert "vit-probe: rollout needs attention over all tokens" in err


def test_positions_after_some_layers(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["positions", "--model", checkpoint, "--out", tmp_path]
    assert run(capsys, monkeypatch, *arguments)[0] == 0
    table = load_result(tmp_path / "position_similarity.safetensors")
    assert run(capsys, monkeypatch, *arguments, "--after-layers", 2)[0] == 0
    tokens = load_result(tmp_path / "position_similarity.safetensors")
    assert (table.after_layers, tokens.after_layers) == (None, 2)
    code, _, err = run(capsys, monkeypatch, *arguments, "--after-layers", 4)
    assert code == 2
    assert "after_layers must be from 0 to 3" in err


# Datasets


def test_broken_photographs_are_left_out_on_demand(
    checkpoint: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.png").write_bytes((photographs / "0.png").read_bytes()[:300])
    arguments = ["distance", "--model", checkpoint, "--images", photographs, "--images", tmp_path / "broken.png"]
    code, _, err = run(capsys, monkeypatch, *arguments, "--out", tmp_path / "stopped")
    assert code == 2
    assert "broken.png" in err
    code, _, err = run(capsys, monkeypatch, *arguments, "--out", tmp_path / "out", "--on-error", "skip")
    assert code == 0, err
    assert "note: broken.png is left out: " in err
    result = load_result(tmp_path / "out" / "attention_distance.safetensors")
    assert result.num_images == 5
    assert list(result.provenance["images"]["skipped"]) == ["broken.png"]
    assert not (tmp_path / "out" / "run-state.safetensors").exists()


def test_a_state_is_resumed_only_on_demand(
    checkpoint: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run-state.safetensors").write_bytes(b"of something else")
    arguments = ["distance", "--model", checkpoint, "--images", photographs, "--out", tmp_path]
    code, _, err = run(capsys, monkeypatch, *arguments, "--resume")
    assert code == 2
    assert "run-state.safetensors is not the state of a run; delete it, or omit --resume" in err
    assert run(capsys, monkeypatch, *arguments)[0] == 0
