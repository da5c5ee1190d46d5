"""The farthest and the local heads of a model, from the literal definition, beside 24 convolutions of 3 x 3."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from analyses.attention_distance import NETWORKS, found, main
from tests import reference
from tests.analyses.conftest import typed
from tests.example_models import expected_attention
from vit_probe import Preprocessing, VisionTransformer, ViTConfig, sample_photographs, save_model
from vit_probe.cli.study import StudyOptions
from vit_probe.measures.receptive_field import plain_stack, receptive_field

GRID = 4, 4, (16, 16)


def write_model(path: Path, near: list[int], far: list[int]) -> VisionTransformer:
    """6 layers of 2 heads on 64 pixels: attention is nearly uniform, but head 0 of some layers is near, head 1 of some far.

    Tokens are their positions, a wave for the row and one for the column. The keys of a near head equal its queries; those of a
    far head are the opposite.
    """
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(64, 16, embed_dim=16, depth=6, num_heads=2, num_classes=2)).eval()
    angles = torch.linspace(0, math.pi * 3 / 4, 4)
    waves = torch.stack([angles.cos(), angles.sin()], dim=1)
    places = torch.cat([waves.repeat_interleave(4, dim=0), waves.repeat(4, 1)], dim=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.003)
        model.pos_embed[0, 1:, :8] = torch.cat([places, -places], dim=1)
        for layer, block in enumerate(model.blocks):
            query, key, _ = block.attn.qkv.weight.chunk(3)
            for head, sign, layers in ((0, 1, near), (1, -1, far)):
                if layer in layers:
                    query[8 * head : 8 * head + 8, :8] = 3 * torch.eye(8)
                    key[8 * head : 8 * head + 8, :8] = sign * torch.eye(8)
    model.preprocessing = Preprocessing((64, 64), resize=64)
    save_model(model, path)
    return model


def kept(out: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    table = pd.read_csv(out / "attention_distance.csv")
    return table[table["head"].notna()], table[table["head"].isna()], json.loads((out / "attention_distance.json").read_text())


def literal(model: VisionTransformer, count: int) -> np.ndarray:
    assert model.preprocessing is not None
    images = torch.stack([model.preprocessing(photograph) for photograph in sample_photographs(count)])
    return reference.mean_attention_distance(expected_attention(model, images), *GRID, 1, "renormalize").mean


def test_as_published_where_heads_are_near_and_far_early_and_far_late(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.safetensors", near=[0, 1, 2], far=[0, 4])
    main(StudyOptions(model=str(tmp_path / "model.safetensors"), out=tmp_path, limit=3))
    heads, fields, study = kept(tmp_path)
    expected = literal(model, 3)
    np.testing.assert_allclose(heads.distance, expected.ravel(), rtol=1e-4)
    uniform = reference.uniform_distance(*GRID)
    local = expected < uniform / 2
    assert local.tolist() == [[True, False]] * 3 + [[False, False]] * 3
    assert expected[0, 1] > 1.1 * uniform
    assert study["as_published"] is True
    assert study["finding"] == (
        f"In the first 2 of 6 layers, the largest mean attention distance of a head is {expected[0, 1]:.1f} px "
        f"({expected[0, 1]:.1f} px in layer 0). A stack of 24 convolutions of 3 x 3 has a receptive field of 49 px: 24 px to "
        f"each side, 33.9 px into the corners, and 5.0 px on average if kernels are uniform. Of the heads in these 2 layers, "
        f"50% are local (distance below half of that of uniform attention, {uniform:.1f} px); in the second half of the "
        f"layers, 0% are."
    )
    last = fields.groupby("network", sort=False).tail(1).set_index("network")
    assert last.receptive_field.to_dict() == {"24 x conv 3 x 3": 49, "AlexNet": 195, "VGG-16": 212, "ResNet-50": 427}
    assert set(heads.network) == {"model.safetensors"}
    assert (tmp_path / "attention_distance.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("near", "far", "early", "late", "holds"), [([0, 5], [], 25, 17, True), ([], [0, 1], 0, 0, False)])
def test_local_heads_late_or_never(near: list[int], far: list[int], early: int, late: int, holds: bool, tmp_path: Path) -> None:
    write_model(tmp_path / "model.safetensors", near, far)
    main(StudyOptions(model=str(tmp_path / "model.safetensors"), out=tmp_path, limit=2))
    study = kept(tmp_path)[2]
    text = f"layers, {early}% are local (distance below half of that of uniform attention, 32.1 px); in the second half of the"
    assert f"{text} layers, {late}% are." in study["finding"]
    assert study["as_published"] is holds


@pytest.mark.parametrize(
    ("what", "distances", "holds"),
    [
        ("as published", [[10, 25], [17, 20], [17, 20], [17, 20], [17, 20], [17, 20]], True),
        ("none reaches farther than half the field", [[10, 23], [17, 20], [17, 30], [17, 20], [17, 20], [17, 20]], False),
        ("no local head", [[18, 25], [17, 20], [10, 20], [10, 20], [17, 20], [17, 20]], False),
        ("none but local heads", [[10, 15], [10, 15], [17, 40], [17, 40], [17, 40], [17, 40]], False),
        ("one local head at the end", [[10, 25], [17, 20], [17, 20], [17, 20], [10, 20], [17, 20]], True),
        ("half of the heads at the end are local", [[10, 25], [17, 20], [17, 20], [10, 20], [10, 20], [10, 20]], False),
    ],
)
def test_each_criterion_decides(what: str, distances: list[list[float]], holds: bool) -> None:
    """Below 16 px a head is local; 24 convolutions see 24 px to each side."""
    layer, _ = (index.ravel() for index in np.indices((6, 2)))
    heads = pd.DataFrame({"layer": layer, "distance": np.ravel(distances), "uniform_distance": 32.0})
    fields = receptive_field(plain_stack(24), network=next(iter(NETWORKS))).to_dataframe()
    assert found(heads, fields).holds is holds, what


def test_one_layer_has_no_second_half() -> None:
    heads = pd.DataFrame({"layer": [0, 0], "distance": [10.0, 30.0], "uniform_distance": 32.0})
    finding = found(heads, receptive_field(plain_stack(24), network=next(iter(NETWORKS))).to_dataframe())
    assert "nan" not in finding.text
    assert finding.holds is None


def test_the_bundled_model_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, main, "--limit", 4, "--out", tmp_path, "--format", "pdf") == 0
    heads, _, study = kept(tmp_path)
    early, late = heads[heads.layer < 3], heads[heads.layer > 4]
    assert f"distance of a head is {early.distance.max():.1f} px" in study["finding"]
    near = [(part.distance < part.uniform_distance / 2) for part in (early, late)]
    assert study["as_published"] == (early.distance.max() > 24 and near[0].any() and near[1].mean() < 0.5)
    assert study["finding"] in capsys.readouterr().out
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {f"attention_distance.{ending}" for ending in ("pdf", "csv", "json")}
    assert typed(monkeypatch, main, "--limit", 4, "--out", tmp_path, "--format", "pdf") == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_unreadable_input_gives_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, main, "--model", tmp_path / "absent.safetensors", "--out", tmp_path) == 2
    assert typed(monkeypatch, main, "--images", tmp_path / "absent.png", "--out", tmp_path) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "there is no checkpoint file or folder" in first
    assert "there is no image file or folder" in second
