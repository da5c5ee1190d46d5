"""The numbers of every measure against its literal reference, on models of several kinds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.example_models import images
from tests.measures.table import IMAGES, ROWS, SETTINGS, Layer, seen
from tests.measures.tiles import feed, grids, random_attention, tilings
from vit_probe import InputError, TokenGrid, measure
from vit_probe.measures.base.discovery import measure_files
from vit_probe.measures.base.per_head import HeadResult
from vit_probe.measures.base.per_layer import LayerResult
from vit_probe.measures.base.registry import registered
from vit_probe.results import Result

pytestmark = pytest.mark.usefixtures("measures_of_users")

CASES = [(setting, name, index) for setting in SETTINGS for name, rows in ROWS.items() for index in range(len(rows))]


def test_every_measure_has_a_row() -> None:
    assert set(registered()) == set(ROWS)
    assert set(measure_files()) < set(ROWS)


# Against the references


@cache
def measured(setting: str) -> dict[tuple[str, int], Result]:
    """All rows that a setting allows, measured in one pass."""
    rows = [(name, index) for at, name, index in CASES if at == setting and setting not in ROWS[name][index].fails]
    functions = [partial(registered()[name].function, **ROWS[name][index].options) for name, index in rows]
    x = images(*SETTINGS[setting].size, batch=IMAGES)
    results = measure(seen(setting).model, x, functions, per_image=True, batch_size=IMAGES, device="cpu")
    return dict(zip(rows, results, strict=True))


def stacked(layers: Sequence[np.ndarray]) -> np.ndarray:
    """(image, layer, ...), with NaN where a layer has fewer heads or entries than others."""
    shape = np.max([layer.shape for layer in layers], axis=0)
    whole = np.full((shape[0], len(layers), *shape[1:]), np.nan)
    for number, layer in enumerate(layers):
        whole[(slice(None), number, *(slice(length) for length in layer.shape[1:]))] = layer
    return whole


@pytest.mark.parametrize(("setting", "name", "index"), CASES)
def test_numbers_of_the_literal_reference(setting: str, name: str, index: int) -> None:
    row, x = ROWS[name][index], images(*SETTINGS[setting].size)
    if setting in row.fails:
        with pytest.raises(InputError, match=re.escape(row.fails[setting])):
            measure(seen(setting).model, x, [partial(registered()[name].function, **row.options)], device="cpu")
        return
    result: Any = measured(setting)[name, index]
    if setting not in row.settings:
        return
    if not isinstance(result, HeadResult | LayerResult):
        for attribute, slow in row.expected(seen(setting), **row.options).items():
            found = getattr(result, attribute)
            tolerance = 1e-6 if found.dtype == np.float32 else 1e-9
            assert found.shape == slow.shape
            np.testing.assert_allclose(found, slow, rtol=0, atol=tolerance, err_msg=attribute)
            assert np.ptp(slow) > 0.01
        return
    layers = [row.expected(layer, **row.options) for layer in seen(setting).layers]
    assert list(result.values) == list(layers[0])
    close = partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-9)  # offsets are tabulated in float32
    for value in result.values:
        slow = stacked([layer[value] for layer in layers])
        close(result.per_image[value], slow, err_msg=value)
        close(result.values[value], slow.mean(axis=0), err_msg=value)
        spread = slow.std(axis=0, ddof=1)
        close(result.std[value], spread, err_msg=value)
        close(result.confidence[value], stats.t.ppf(0.975, IMAGES - 1) * spread / IMAGES**0.5, err_msg=value)
    assert np.nanstd(result.values[result.main]) > 1e-3  # else the comparison would be empty
    assert result.num_images == IMAGES
    assert result.options == dict(registered()[name].options) | row.options | {"per_image": True}


@pytest.mark.parametrize(("name", "index"), sorted({(name, index) for _, name, index in CASES}))
@settings(max_examples=6, deadline=None)
@given(grid=grids, batch=st.integers(1, 3), tiling=tilings, seed=st.integers(0, 99))
def test_random_attention_in_any_tiles(
    name: str, index: int, grid: TokenGrid, batch: int, tiling: dict[str, Any], seed: int
) -> None:
    """Measures per head, on grids of any shape with any number of prefix tokens, in float32."""
    observer = getattr(registered()[name].function, "observer", None)
    if observer is None:
        return
    attention, row = random_attention(grid, batch=batch, heads=3, seed=seed), ROWS[name][index]
    result = feed(observer(grid, per_image=True, **row.options), attention, **tiling).compute()
    nothing = np.zeros((batch, grid.num_patches, 0))
    scale = max(grid.rows * grid.patch_size[0], grid.cols * grid.patch_size[1]) if result.unit == "pixels" else 1
    for number, weights in enumerate(attention):
        layer = Layer(weights, nothing, grid.rows, grid.cols, grid.patch_size, grid.num_prefix_tokens)
        for value, slow in row.expected(layer, **row.options).items():
            found = result.per_image[value][:, number]
            np.testing.assert_allclose(found, slow, rtol=0, atol=1e-5 * scale, err_msg=value)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ROWS)
def test_uniform_attention(setting: str, name: str) -> None:
    """The reference, applied to uniform attention, gives what the result says of it, in windows, too."""
    result = measured(setting).get((name, 0))
    if not isinstance(result, HeadResult):
        return
    of_offsets = "prefix" in registered()[name].options
    for number, layer in enumerate(seen(setting).layers):
        slow = ROWS[name][0].expected(layer.uniform(to_visible_patches=of_offsets))
        assert result.main in result.uniform
        for value, by_layer in result.uniform.items():
            np.testing.assert_allclose(by_layer[number], slow[value].mean(), rtol=0, atol=1e-12, err_msg=value)
