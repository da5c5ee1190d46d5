"""Queries whose attention on patches rounds to 0: left out of the mean, and counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.measures.tiles import feed, random_attention
from tests.reference import patch_centres
from vit_probe import InputError, TokenGrid, attention_offset, load_result, local_mass, mean_attention_distance
from vit_probe.tokens.grid import Windows

GRID = TokenGrid(2, 3, (8, 4), 1, True)
CENTRES = patch_centres(2, 3, 8, 4)


def attention_to_the_class_token(*queries: tuple[int, int, int]) -> np.ndarray:
    """Random attention in which these queries (image, head, patch) attend to the class token alone."""
    attention = random_attention(GRID)
    for image, head, patch in queries:
        attention[:, image, head, 1 + patch] = np.eye(7)[0]
    return attention


def expected_distance(attention: np.ndarray) -> np.ndarray:
    """(layer, image, head), the mean over the queries that have attention on patches; NaN where none has."""
    distance = np.linalg.norm(CENTRES[:, None] - CENTRES, axis=-1)
    layers, images, heads = attention.shape[:3]
    result = np.full((layers, images, heads), np.nan)
    for place in np.ndindex(layers, images, heads):
        values = []
        for query in range(6):
            weights = attention[place][1 + query, 1:]
            if weights.sum() > 0:
                values.append((weights * distance[query]).sum() / weights.sum())
        if values:
            result[place] = np.mean(values)
    return result


TILINGS = [{}, {"rows": 2}, {"heads": 1, "rows": 3}, {"images": 1}, {"disposable": True}]


@pytest.mark.parametrize("tiling", TILINGS)
def test_queries_without_attention_on_patches_are_left_out_and_counted(tiling: dict[str, Any]) -> None:
    attention = attention_to_the_class_token((0, 0, 0), (0, 0, 4), (2, 1, 5))
    result = feed(mean_attention_distance.observer(GRID, per_image=True), attention, **tiling).compute()
    expected = expected_distance(attention)
    np.testing.assert_allclose(result.distance, expected.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(result.per_image["distance"], expected.swapaxes(0, 1), rtol=1e-5)
    table = result.to_dataframe()
    np.testing.assert_allclose(table["excluded"], [2 / 18, 1 / 18] * 2)
    np.testing.assert_allclose(result.patch_mass, attention[..., 1:, 1:].sum(-1).mean((1, 3)), rtol=1e-5)


def test_an_image_without_any_such_query_is_left_out_of_the_mean_of_its_head() -> None:
    attention = attention_to_the_class_token(*((1, 0, patch) for patch in range(6)))
    result = feed(mean_attention_distance.observer(GRID), attention).compute()
    np.testing.assert_allclose(result.distance, np.nanmean(expected_distance(attention), axis=1), rtol=1e-5)
    np.testing.assert_allclose(result.std["distance"], np.nanstd(expected_distance(attention), axis=1, ddof=1), rtol=1e-4)


def test_a_head_that_never_attends_to_patches_has_no_distance_but_a_row(tmp_path) -> None:
    attention = attention_to_the_class_token(*((image, 0, patch) for image in range(3) for patch in range(6)))
    result = load_result(feed(mean_attention_distance.observer(GRID), attention).compute().save(tmp_path / "one.safetensors"))
    table = result.to_dataframe()
    assert table["head"].tolist() == [0, 1, 0, 1]
    assert table["distance"].isna().tolist() == [True, False, True, False]
    assert table["excluded"].tolist() == [1, 0, 1, 0]
    assert table["patch_mass"].tolist()[::2] == [0, 0]
    assert result.summary()["highest head"].notna().all()
    assert result.plot() is not None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("empty_layers", [1, 2])
def test_layers_whose_heads_never_attend_to_patches_have_no_distance(empty_layers: int, tmp_path) -> None:
    attention = random_attention(GRID)
    attention[:empty_layers, :, :, 1:] = np.eye(7)[0]
    result = load_result(feed(mean_attention_distance.observer(GRID), attention).compute().save(tmp_path / "one.safetensors"))
    assert result.summary()["highest head"].isna().tolist() == [True, empty_layers == 2]
    key_numbers = {name: value for name, _, value in result.key_numbers()}
    if empty_layers == 2:
        assert key_numbers == {}
    else:
        assert key_numbers["highest head"] == np.nanmax(result.distance)
        assert np.isfinite(list(key_numbers.values())).all()
    for kind in ("depth", "sorted"):
        result.plot(kind=kind).figure.canvas.draw()


def test_the_threshold_is_where_rounding_distorts() -> None:
    """Weights of 1e-37 are exact, and so is what follows; of 1e-44 a few bits are left."""
    attention = np.zeros((1, 1, 1, 7, 7))
    attention[..., 0] = 1
    for query, size in enumerate([1, 1e-20, 1e-29, 1e-33, 1e-37, 1e-44], start=1):
        attention[..., query, 1:3] = size / 2
    result = feed(mean_attention_distance.observer(GRID), attention).compute()
    assert result.excluded[0, 0] == 0.5
    distance = np.linalg.norm(CENTRES[:3, None] - CENTRES[:2], axis=-1).mean()
    np.testing.assert_allclose(result.distance, distance, rtol=1e-6)


def test_nothing_is_excluded_where_prefix_attention_is_dropped_or_there_is_none() -> None:
    attention = attention_to_the_class_token((0, 0, 0))
    dropped = feed(mean_attention_distance.observer(GRID, prefix="drop"), attention).compute()
    assert "excluded" not in dropped.values
    assert "excluded" not in feed(local_mass.observer(GRID), random_attention(GRID)).compute().to_dataframe()


def test_offsets_and_aligned_attention_leave_out_the_same_queries() -> None:
    attention = attention_to_the_class_token((0, 0, 0), (0, 0, 4))
    result = feed(attention_offset.observer(GRID), attention).compute()
    weights = attention[..., 1:, 1:]
    mass = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, mass, out=np.full_like(weights, np.nan), where=mass > 0)
    right = CENTRES[:, 1] - CENTRES[:, None, 1]
    np.testing.assert_allclose(result.dx, np.nanmean((weights * right).sum(-1), axis=-1).mean(axis=1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result.values["aligned"].sum((2, 3)), 1, rtol=1e-5)
    np.testing.assert_allclose(result.to_dataframe()["excluded"], [2 / 18, 0] * 2)


def test_padding_of_windows_does_not_count_as_excluded() -> None:
    windows = Windows(TokenGrid(1, 3, (8, 8), 0, False), torch.tensor([[0, 1], [2, -1]]))
    attention = np.full((1, 2, 1, 2, 2), 0.5)
    attention[:, 1, :, 0] = [0, 1]  # patch 2 attends to padding alone
    result = feed(
        mean_attention_distance.observer(TokenGrid(1, 3, (8, 8), 0, False), windows={0: windows}), attention
    ).compute()
    np.testing.assert_allclose(result.distance, 4)
    np.testing.assert_allclose(result.excluded, 1 / 3)


def test_attention_that_is_not_a_number_is_an_error() -> None:
    attention = random_attention(GRID)
    attention[0, 0, 0, 3, 3] = np.nan
    with pytest.raises(InputError, match="not all finite"):
        feed(mean_attention_distance.observer(GRID), attention)
