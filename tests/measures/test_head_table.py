"""Distance and entropy of every head in one table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.example_models import images, small_vit, swin, transformers_vit
from vit_probe import InputError, attention_entropy, mean_attention_distance
from vit_probe.measures import AttentionDistance, AttentionDistanceResult, AttentionEntropy, AttentionEntropyResult
from vit_probe.measures.head_table import head_table
from vit_probe.runner.run import AttentionRun

COLUMNS = [
    *("layer", "module", "head"),
    *("distance", "distance_std", "distance_confidence", "patch_mass", "uniform_distance", "num_windows"),
    *("entropy", "entropy_std", "entropy_confidence", "prefix_mass", "self_mass", "uniform_entropy", "num_images"),
]


def measured(model: Any, x: Any) -> tuple[AttentionDistanceResult, AttentionEntropyResult]:
    """Of one pass."""
    run = AttentionRun(model, x, batch_size=2, device="cpu")
    far, broad = AttentionDistance(run.grid, windows=run.windows), AttentionEntropy(run.grid, windows=run.windows)
    run.observe(far, broad)
    return far.compute(run.provenance(far.options)), broad.compute(run.provenance(broad.options))


def test_each_row_holds_what_the_two_results_say_of_a_head() -> None:
    model, x = small_vit(depth=3, num_registers=1), images()
    table = head_table(*measured(model, x))
    assert list(table) == COLUMNS
    assert table[["layer", "head"]].to_numpy().tolist() == [[layer, head] for layer in range(3) for head in range(2)]
    distance, entropy = mean_attention_distance(model, x, device="cpu"), attention_entropy(model, x, device="cpu")
    sources: dict[str, np.ndarray] = {
        "distance": distance.distance,
        "distance_std": distance.std,
        "distance_confidence": distance.confidence,
        "patch_mass": distance.patch_mass,
        "entropy": entropy.entropy,
        "entropy_std": entropy.std,
        "entropy_confidence": entropy.confidence,
        "prefix_mass": entropy.prefix_mass,
        "self_mass": entropy.self_mass,
    }
    for name, values in sources.items():
        np.testing.assert_allclose(table[name], values.ravel(), rtol=1e-5, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(table.patch_mass + table.prefix_mass, 1, rtol=1e-6)
    assert set(table.num_images) == {3}
    assert set(table.uniform_entropy) == {np.log(14)}


def test_layers_of_fewer_heads() -> None:
    table = head_table(*measured(swin(), images(48, 48)))
    assert table[["layer", "head"]].to_numpy().tolist() == [[0, 0], [1, 0], [2, 0], [2, 1], [3, 0], [3, 1]]
    assert table.num_windows.tolist() == [16, 16, 4, 4, 4, 4]
    assert not table.isna().any().any()


def test_what_was_passed_by_is_told() -> None:
    table = head_table(*measured(transformers_vit("SiglipVision", image_size=32), images(32, 32)))
    assert table.attrs["skipped"].keys() == {"head.attention"}


def test_results_without_provenance() -> None:
    distance, entropy = measured(small_vit(), images())
    assert len(head_table(replace(distance, provenance={}), replace(entropy, provenance={}))) == 4


@pytest.mark.parametrize(
    ("model", "batch", "seed", "differs"),
    [
        ({"depth": 3}, 3, 1, "layers, heads and model"),
        ({"num_heads": 4}, 3, 1, "heads and model"),
        ({}, 2, 1, "number of images and images"),
        ({}, 3, 2, "images"),
    ],
)
def test_results_that_do_not_belong_together(model: dict[str, int], batch: int, seed: int, differs: str) -> None:
    distance, _ = measured(small_vit(), images())
    _, entropy = measured(small_vit(**model), images(batch=batch, seed=seed))
    with pytest.raises(InputError, match=f"that differ in their {differs} do not make one table; measure both in one pass"):
        head_table(distance, entropy)
