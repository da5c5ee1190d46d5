"""Results with values per head: several of them in one table, layers of fewer heads."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.example_models import images, small_vit, swin, transformers_vit
from vit_probe import InputError, attention_entropy, local_mass, mean_attention_distance, measure
from vit_probe.measures.base.per_head import HeadResult, head_table

COLUMNS = [
    *("layer", "module", "head"),
    *("distance", "distance_std", "distance_confidence", "patch_mass", "uniform_distance", "num_windows"),
    *("entropy", "entropy_std", "entropy_confidence", "prefix_mass", "self_mass", "uniform_entropy", "num_images"),
]


def measured(model: Any, x: Any) -> list[HeadResult]:
    """Distance and entropy from one pass."""
    return measure(model, x, [mean_attention_distance, attention_entropy], batch_size=2, device="cpu")


# head_table


def test_each_row_holds_the_values_of_both_results() -> None:
    model, x = small_vit(depth=3, num_registers=1), images()
    table = head_table(*measured(model, x))
    assert list(table) == COLUMNS
    assert table[["layer", "head"]].to_numpy().tolist() == [[layer, head] for layer in range(3) for head in range(2)]
    distance, entropy = mean_attention_distance(model, x, device="cpu"), attention_entropy(model, x, device="cpu")
    sources: dict[str, np.ndarray] = {
        "distance": distance.distance,
        "distance_std": distance.std["distance"],
        "distance_confidence": distance.confidence["distance"],
        "patch_mass": distance.patch_mass,
        "entropy": entropy.entropy,
        "entropy_std": entropy.std["entropy"],
        "entropy_confidence": entropy.confidence["entropy"],
        "prefix_mass": entropy.prefix_mass,
        "self_mass": entropy.self_mass,
    }
    for name, values in sources.items():
        np.testing.assert_allclose(table[name], values.ravel(), rtol=1e-5, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(table.patch_mass + table.prefix_mass, 1, rtol=1e-6)
    assert set(table.num_images) == {3}
    np.testing.assert_allclose(table.uniform_entropy, np.log(14), rtol=1e-12)


def test_layers_of_fewer_heads() -> None:
    table = head_table(*measured(swin(), images(48, 48)))
    assert table[["layer", "head"]].to_numpy().tolist() == [[0, 0], [1, 0], [2, 0], [2, 1], [3, 0], [3, 1]]
    assert table.num_windows.tolist() == [16, 16, 4, 4, 4, 4]
    assert not table.isna().any().any()


def test_skipped_attention_is_named_in_the_attributes() -> None:
    table = head_table(*measured(transformers_vit("SiglipVision", image_size=32), images(32, 32)))
    assert table.attrs["skipped"].keys() == {"head.attention"}


def test_results_without_provenance() -> None:
    distance, entropy = measured(small_vit(), images())
    assert len(head_table(replace(distance, provenance={}), replace(entropy, provenance={}))) == 4


def test_a_column_of_both_results_appears_once() -> None:
    """Distance and local mass both have the mass on patches, which differs by rounding if they are measured apart."""
    model, x = small_vit(), images()
    distance, local = mean_attention_distance(model, x, device="cpu"), local_mass(model, x, batch_size=1, device="cpu")
    local.values["patch_mass"] *= 1 + 1e-12
    table = head_table(distance, local)
    assert len(table) == 4
    assert list(table).count("patch_mass") == 1
    np.testing.assert_array_equal(table["patch_mass"], distance.patch_mass.ravel())
    np.testing.assert_array_equal(table["local_mass"], local.local_mass.ravel())


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
    with pytest.raises(InputError, match=f"that differ in their {differs} do not make one table; measure them in one pass"):
        head_table(distance, entropy)


def test_one_measure_with_two_options_makes_no_table() -> None:
    both = [mean_attention_distance, partial(mean_attention_distance, prefix="drop")]
    results = measure(small_vit(), images(), both, device="cpu")
    with pytest.raises(InputError, match=r"different values of distance.* do not make one table; head_table takes one result"):
        head_table(*results)
