"""All measures of a model at once, compared with each measure by itself."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.example_models import Hungry, classifier, images, swin, transformers_vit
from tests.measures.tiles import arrays_of
from tests.tokens.test_hidden_states import Attention, Direct
from tests.tokens.test_patch_tokens import Plain
from vit_probe import InputError, VisionTransformer, ViTConfig, mean_attention_distance
from vit_probe.errors import AssumptionWarning
from vit_probe.measures.base.discovery import measure_files
from vit_probe.measures.base.registry import registered
from vit_probe.measures.overview import Overview, overview
from vit_probe.measures.patch_filters import low_frequency_share
from vit_probe.plots.comparison import plot_comparison

pytestmark = pytest.mark.usefixtures("own_registry")

FILES = measure_files()
OF_IMAGES = {name for name, one in FILES.items() if one.takes_images}
OF_TOKENS = {"feature_spectrum", "representation_similarity", "token_norms", "token_similarity"}


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    return classifier(depth=3)


@pytest.fixture(scope="module")
def found(model: VisionTransformer) -> Overview:
    return overview(model, images(32, 32, batch=6), device="cpu")


def test_each_result_is_what_its_measure_gives(model: VisionTransformer, found: Overview) -> None:
    assert list(found.results) == list(FILES)
    assert {"attention_distance", "attention_entropy", "rollout", "class_attention", "patch_filters"} < set(found.results)
    assert found.left_out == {}
    for name, result in found.results.items():
        function: Any = registered()[name].function
        expected = function(model, images(32, 32, batch=6), device="cpu") if name in OF_IMAGES else function(model)
        assert result.provenance == expected.provenance, name
        assert list(arrays_of(result)) == list(arrays_of(expected))
        for field, values in arrays_of(expected).items():
            np.testing.assert_allclose(arrays_of(result)[field], values, rtol=1e-5, atol=1e-5, err_msg=f"{name}.{field}")


def test_the_numbers(found: Overview) -> None:
    table = found.numbers()
    assert list(table) == ["measure", "number", "unit", "value"]
    assert not table.duplicated(["measure", "number"]).any()
    assert set(table.measure) == set(found.results)
    value = table.set_index(["measure", "number"])["value"]
    results: dict[str, Any] = found.results
    far, broad = results["attention_distance"].distance, results["attention_entropy"].entropy
    for name, heads in (("attention_distance", far), ("attention_entropy", broad)):
        assert value[name, "lowest head"] == heads.min()
        assert value[name, "highest head"] == heads.max()
        assert value[name, "range of heads"] == heads.max() - heads.min()
        assert value[name, "range within a layer"] == pytest.approx(np.mean([max(row) - min(row) for row in heads]))
    assert value["attention_entropy", "uniform attention"] == pytest.approx(np.log(17))
    assert value["attention_entropy", "self mass"] == pytest.approx(results["attention_entropy"].self_mass.mean())
    assert value["attention_entropy", "prefix mass"] == pytest.approx(results["attention_entropy"].prefix_mass.mean())
    assert ("attention_distance", "patch mass") not in value  # models are not compared by it
    assert value["patch_filters", "low frequencies"] == low_frequency_share(results["patch_filters"].filters)
    alike = results["position_similarity"].similarity
    near, distant = [], []
    for row, col, other_row, other_col in np.ndindex(4, 4, 4, 4):
        apart = np.hypot(row - other_row, col - other_col)
        if apart == 1:
            near.append(alike[row, col, other_row, other_col])
        if apart > 2:
            distant.append(alike[row, col, other_row, other_col])
    assert value["position_similarity", "neighbours"] == pytest.approx(np.mean(near))
    assert value["position_similarity", "far apart"] == pytest.approx(np.mean(distant))
    maps = results["rollout"].maps.reshape(6, 16)
    assert value["rollout", "largest over mean"] == pytest.approx(np.median([one.max() / one.mean() for one in maps]))
    pairs = [np.corrcoef(maps[one], maps[other])[0, 1] for one in range(6) for other in range(one)]
    assert value["rollout", "correlation of images"] == pytest.approx(np.median(pairs))
    assert value["class_attention", "attention on prefix tokens"] == pytest.approx(
        results["class_attention"].prefix_mass.mean()
    )
    assert value["representation_similarity", "first and last layer"] == results["representation_similarity"].similarity[0, 2]
    norms = results["token_norms"].to_dataframe()
    assert value["token_norms", "after the last layer"] == norms["median"].iloc[-1]
    assert value["token_similarity", "after the first layer"] == results["token_similarity"].token_similarity[0]
    assert value["feature_spectrum", "after the last layer"] == results["feature_spectrum"].feature_spectrum[-1, -1]
    assert value["local_mass", "uniform attention"] == results["local_mass"].uniform_local_mass[0]
    assert value["attention_sinks", "prefix 0"] == pytest.approx(results["attention_sinks"].prefix_0.mean())


def test_one_image_has_no_pairs(model: VisionTransformer) -> None:
    found = overview(model, images(32, 32, batch=1), device="cpu")
    assert list(found.left_out) == ["representation_similarity"]
    value = found.numbers().set_index(["measure", "number"])["value"]
    assert np.isnan(value["rollout", "correlation of images"])
    assert np.isfinite(value.drop(("rollout", "correlation of images"))).all()


def test_windows_have_no_rollout() -> None:
    found = overview(swin(), images(48, 48, batch=4), device="cpu")
    assert set(found.left_out) == {"rollout", "class_attention", "attention_sinks", "position_similarity"}
    for name in ("rollout", "class_attention", "attention_sinks"):
        assert "attend within windows" in found.left_out[name]
    assert set(found.results) == set(FILES) - set(found.left_out)
    assert found.numbers()["value"].notna().all()


def test_a_model_without_class_token_or_positions() -> None:
    config = ViTConfig(
        image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, class_token=False, pooling="avg", position="none"
    )
    found = overview(VisionTransformer(config), images(32, 32, batch=4), device="cpu")
    assert set(found.left_out) == {"class_attention", "position_similarity"}
    assert "no class token" in found.left_out["class_attention"]


def test_an_iterator_is_read_once(model: VisionTransformer) -> None:
    found = overview(model, iter([images(32, 32, batch=4)]), device="cpu")
    assert found.left_out == {}
    assert {result.provenance["images"]["count"] for name, result in found.results.items() if name in OF_IMAGES} == {4}


def test_blocks_that_do_not_show_their_tokens() -> None:
    """The measures of attention take a second pass, which an iterator does not allow."""
    direct = Direct(Attention(), torch.nn.ModuleList([torch.nn.Identity(), Attention()])).eval()
    found = overview(direct, images(batch=4), device="cpu")
    assert "does not take the tokens from the block before it" in found.left_out["token_norms"]
    assert {name for name, reason in found.left_out.items() if reason == found.left_out["token_norms"]} == OF_TOKENS
    expected = mean_attention_distance(direct, images(batch=4), device="cpu")
    distance = found.results["attention_distance"]
    np.testing.assert_array_equal(distance.to_dataframe()["distance"], expected.to_dataframe()["distance"])
    assert distance.provenance == expected.provenance
    with pytest.raises(InputError, match="does not take the tokens from the block before it"):
        overview(direct, iter([images(batch=4)]), device="cpu")


def test_blocks_that_cannot_be_told_apart() -> None:
    """This is known before the first image, so an iterator suffices."""
    found = overview(Plain(shared=True), iter([images(batch=4)]), device="cpu")
    assert "has no block of its own" in found.left_out["token_norms"]
    assert found.results["attention_distance"].provenance["images"]["count"] == 4


def test_numbers_that_are_not_finite(model: VisionTransformer) -> None:
    with pytest.raises(InputError, match="not all finite"):
        overview(model, images(32, 32, batch=4) * 1e37, device="cpu")


def test_too_little_memory_for_one_measure() -> None:
    """The others have their results, for an iterator too."""
    for given in (images(batch=9), iter([images(batch=9)])):
        with pytest.warns(
            AssumptionWarning, match="out of memory with a batch of 4 images; measures that need at least 4 images per batch"
        ):
            found = overview(Hungry(3), given, batch_size=8, device="cpu")
        assert "came in smaller ones" in found.left_out["representation_similarity"]
        counts = [vars(found.results[name])["num_images"] for name in ("token_norms", "attention_distance")]
        assert counts == [9, 9]


def test_an_even_rollout_correlates_with_none(found: Overview) -> None:
    rollout: Any = found.results["rollout"]
    maps = rollout.maps.copy()
    maps[0] = 1 / 16
    changed = Overview({"rollout": replace(rollout, maps=maps)}, {}).numbers().set_index("number")["value"]
    pairs = [np.corrcoef(maps[one].ravel(), maps[other].ravel())[0, 1] for one in range(1, 6) for other in range(1, one)]
    assert changed["correlation of images"] == pytest.approx(np.median(pairs))


def test_of_another_library() -> None:
    found = overview(transformers_vit("Dinov2", image_size=32), images(32, 32, batch=4), device="cpu")
    assert found.left_out == {}
    assert found.numbers()["value"].notna().all()


def test_the_panels_can_be_drawn(model: VisionTransformer, found: Overview) -> None:
    with torch.no_grad():
        figure = plot_comparison({"one": found.panels(), "two": found.panels()}, columns=4)
    assert len(figure.axes) == 2 * math.ceil(len(FILES) / 4) * 5  # rows of two models, four measures and their names
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert len(titles) == len(found.results) == len(FILES)
    assert pd.Series(titles).is_unique
