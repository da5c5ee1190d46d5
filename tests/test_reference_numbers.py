"""Agreement with numbers computed elsewhere: a pretrained DINOv2 ViT-S/14 on 32 photographs, by transformers in float64."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import reference
from vit_probe import load_model, patch_filters, position_similarity
from vit_probe.measures import AttentionDistance, AttentionDistanceResult, AttentionRollout
from vit_probe.runner.run import AttentionRun

SHARED = Path(__file__).resolve().parents[1].parent / "shared"

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"../shared is not here: {SHARED} does not exist")


@dataclass
class Measured:
    model: Any
    renormalized: AttentionDistanceResult
    dropped: AttentionDistanceResult
    first_map: np.ndarray


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    return json.loads((SHARED / "reference" / "dinov2_small_224.json").read_text())


@pytest.fixture(scope="module")
def measured(numbers: dict[str, Any]) -> Measured:
    model = load_model(SHARED / "checkpoints" / "dinov2-small")
    paths = [SHARED / "imagenet-sample-128" / name for name in numbers["images"]]
    run = AttentionRun(model, paths, batch_size=8, device="cpu")
    both = AttentionDistance(run.grid), AttentionDistance(run.grid, prefix="drop")
    run.observe(*both)
    first = AttentionRun(model, paths[:1], device="cpu")
    first.observe(rollout := AttentionRollout(first.grid))
    return Measured(
        model,
        both[0].compute(run.provenance(both[0].options)),
        both[1].compute(run.provenance(both[1].options)),
        rollout.compute().maps[0],
    )


def close(mine: Any, theirs: Any, tolerance: float) -> None:
    mine, theirs = np.asarray(mine), np.asarray(theirs)
    assert mine.shape == theirs.shape
    print(f"largest difference {abs(mine - theirs).max():.1e}")
    assert abs(mine - theirs).max() < tolerance


def test_the_grid_and_the_images(measured: Measured, numbers: dict[str, Any]) -> None:
    grid = measured.renormalized.provenance["grid"]
    assert [grid["rows"], grid["cols"]] == numbers["grid"]
    assert grid["patch_size"] == [numbers["patch_size"]] * 2
    assert grid["num_prefix_tokens"] == numbers["num_prefix_tokens"]
    assert measured.renormalized.provenance["images"]["names"] == numbers["images"]
    assert measured.renormalized.num_images == len(numbers["images"])


@pytest.mark.parametrize(("prefix", "name"), [("renormalize", "renormalized"), ("drop", "dropped")])
def test_mean_attention_distance(measured: Measured, numbers: dict[str, Any], prefix: str, name: str) -> None:
    close(getattr(measured, name).distance, numbers["mean_attention_distance_px"][prefix], 0.05)


def test_spread_over_images(measured: Measured, numbers: dict[str, Any]) -> None:
    close(measured.renormalized.std, numbers["std_over_images_px"]["renormalize"], 0.05)


def test_patch_mass(measured: Measured, numbers: dict[str, Any]) -> None:
    close(measured.renormalized.patch_mass, numbers["patch_mass"], 1e-4)
    close(measured.dropped.patch_mass, numbers["patch_mass"], 1e-4)


def test_uniform_distance(measured: Measured, numbers: dict[str, Any]) -> None:
    close(measured.renormalized.uniform_distance, [numbers["uniform_distance_px"]] * 12, 1e-6)


def test_rollout(measured: Measured, numbers: dict[str, Any]) -> None:
    close(measured.first_map, numbers["rollout_first_image_cls_to_patches"], 1e-5)


def test_patch_filters(measured: Measured, numbers: dict[str, Any]) -> None:
    result = patch_filters(measured.model)
    close(result.explained_variance_ratio, numbers["patch_filter_pca_explained_variance_ratio_first_28"], 1e-4)
    filters, _ = reference.patch_filter_pca(measured.model.patch_embed.proj.weight.detach().numpy(), 28)
    close(result.filters, filters, 1e-4)


def test_position_similarity(measured: Measured, numbers: dict[str, Any]) -> None:
    expected = numbers["position_similarity"]
    similarity = position_similarity(measured.model).similarity
    assert list(similarity.shape) == expected["shape"]
    close(similarity[0, 0, 0], expected["tile_0_0_row_0"], 1e-4)
    close(similarity[18, 18, 18], expected["tile_18_18_row_18"], 1e-4)
    close(similarity.min(), expected["minimum"], 1e-4)
    close(similarity.mean(dtype=np.float64), expected["mean"], 1e-4)
