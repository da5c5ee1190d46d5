"""Agreement with numbers computed elsewhere.

A pretrained DINOv2 ViT-S/14 on 32 photographs, by transformers in float64; and a tiny ViT on two images, by the code of Walmer
et al. 2023 (vit_analysis) and the formula of Park & Kim 2022 (how-do-vits-work).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import reference
from tests.measures.tiles import Tokens
from vit_probe import (
    VisionTransformer,
    ViTConfig,
    attention_offset,
    feature_spectrum,
    load_model,
    mean_attention_distance,
    measure,
    patch_filters,
    position_similarity,
    token_similarity,
)
from vit_probe.measures.base.per_head import HeadResult
from vit_probe.measures.rollout import AttentionRollout
from vit_probe.runner.run import AttentionRun

SHARED = Path(__file__).resolve().parents[1].parent / "shared"

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"../shared is not here: {SHARED} does not exist")


@dataclass
class Measured:
    model: Any
    renormalized: HeadResult
    dropped: HeadResult
    first_map: np.ndarray


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    return json.loads((SHARED / "reference" / "dinov2_small_224.json").read_text())


@pytest.fixture(scope="module")
def measured(numbers: dict[str, Any]) -> Measured:
    model = load_model(SHARED / "checkpoints" / "dinov2-small")
    paths = [SHARED / "imagenet-sample-128" / name for name in numbers["images"]]
    # The reference was made with a crop that rounds as torchvision's does; the checkpoint's own processor rounds down.
    preprocessing = replace(model.preprocessing, crop_rounding="half_to_even")
    run = AttentionRun(model, paths, preprocessing=preprocessing, batch_size=8, device="cpu")
    both = mean_attention_distance.observer(run.grid), mean_attention_distance.observer(run.grid, prefix="drop")
    run.observe(*both)
    first = AttentionRun(model, paths[:1], preprocessing=preprocessing, device="cpu")
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
    close(measured.renormalized.std["distance"], numbers["std_over_images_px"]["renormalize"], 0.05)


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


# A tiny ViT


@dataclass
class Tiny:
    numbers: dict[str, Any]
    model: VisionTransformer
    images: torch.Tensor


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    folder = SHARED / "reference" / "attribution"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    config = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, mlp_ratio=2, num_classes=5)
    model = VisionTransformer(config).double()
    model.load_state_dict(load_file(folder / "tiny_vit.safetensors"))
    (x,) = load_file(folder / "images.safetensors").values()
    return Tiny(json.loads((folder / "walmer_park.json").read_text()), model.eval(), x)


def test_the_tiny_model_is_read_as_it_was_written(tiny: Tiny) -> None:
    logits = json.loads((SHARED / "reference" / "attribution" / "logits.json").read_text())
    with torch.no_grad():
        close(tiny.model(tiny.images).numpy(), logits["logits"], 1e-12)


def test_attention_by_offset_is_walmers(tiny: Tiny) -> None:
    """Their code divides the aligned maps by the number of calls, one for both images; its unit of offsets is 24 pixels."""
    result = attention_offset(tiny.model, tiny.images, device="cpu")
    close(result.aligned, np.array(tiny.numbers["aligned"]) / 2, 1e-9)
    length, right, down = 24 * np.array(tiny.numbers["offset"])
    close(result.length, length, 1e-9)
    close(result.dx, right, 1e-9)
    close(result.dy, down, 1e-9)
    assert abs(right - down).max() > 1


def test_distance_is_walmers(tiny: Tiny) -> None:
    """In units of 24 pixels, the distance between the outermost patch centres; their table of distances is in float32."""
    result = mean_attention_distance(tiny.model, tiny.images, per_image=True, device="cpu")
    close(result.per_image["distance"], 24 * np.array(tiny.numbers["distance"]), 1e-5)


def test_similarity_of_tokens(tiny: Tiny) -> None:
    result = token_similarity(tiny.model, tiny.images, per_image=True, device="cpu")
    close(result.per_image["token_similarity"].T, tiny.numbers["cosine"], 1e-9)


def test_spectrum_of_tokens_is_park_and_kims(tiny: Tiny) -> None:
    result = feature_spectrum(tiny.model, tiny.images, profile="diagonal", device="cpu")
    close(result.feature_spectrum, tiny.numbers["fourier"], 1e-9)


def test_norms_of_tokens(tiny: Tiny) -> None:
    AttentionRun(tiny.model, tiny.images, device="cpu").observe(tokens := Tokens())
    norms = np.stack([np.linalg.norm(tokens.of(layer), axis=-1) for layer in range(3)])
    close(norms, np.array(tiny.numbers["norms"])[:, :, 1:], 1e-9)


def test_all_of_them_in_one_pass(tiny: Tiny) -> None:
    offset, distance, alike = measure(
        tiny.model, tiny.images, [attention_offset, mean_attention_distance, token_similarity], batch_size=1, device="cpu"
    )
    close(offset.aligned, np.array(tiny.numbers["aligned"]) / 2, 1e-9)
    close(distance.distance, 24 * np.mean(tiny.numbers["distance"], axis=0), 1e-5)
    close(alike.token_similarity, np.mean(tiny.numbers["cosine"], axis=1), 1e-9)
