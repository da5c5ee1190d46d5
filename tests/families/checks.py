"""Tests that every family of every library passes. Each test module parametrizes these classes with its families."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.attention.test_hooks import leaves_nothing
from tests.example_models import Assemble, output
from tests.families import reference
from tests.families.family import Family, Size
from tests.families.multihead import without_fast_path
from vit_probe import attention_hooks, mean_attention_distance
from vit_probe.tokens.locate import locate_tokens

TOLERANCE = 1e-5
# Largest difference of the outputs in lower precision, relative to the output's largest magnitude.
_TOLERANCE_OF_DTYPE = {torch.float16: 0.02, torch.bfloat16: 0.1}


def hooked(model: nn.Module, images: Tensor, **options: Any) -> tuple[Tensor, Assemble, list[str], dict[str, str]]:
    """Run the model under hooks: its output, the recorded attention, the paths of its layers, and the skipped modules."""
    recorded = Assemble()
    with attention_hooks(model, recorded, **options) as hooks:
        result = output(model(images))
    return result, recorded, hooks.layers, hooks.skipped


def deviation(family: Family, size: Size | None = None, **options: Any) -> tuple[float, float]:
    """Largest difference, in attention and in output, between the model under hooks and the library's unfused attention."""
    model, images = family.model(size), family.images(size)
    with torch.no_grad():
        unfused = family.unfused(model, images, family.layers)
        result, recorded, layers, _ = hooked(model, images, **options)
    assert tuple(layers) == family.layers
    assert tuple(unfused.maps) == family.layers
    maps = [np.abs(recorded.layers[layer] - unfused.maps[name].numpy()).max() for layer, name in enumerate(layers)]
    assert all(far_from_uniform(attention) for attention in unfused.maps.values())
    assert 0.05 < unfused.output.std() < 100  # otherwise the tolerance would mean nothing
    return float(max(maps)), float((result - unfused.output).abs().max())


def far_from_uniform(attention: Tensor) -> bool:
    return float(attention.amax(-1).mean()) > 2 / attention.shape[-1]


def skipped(family: Family, size: Size | None = None) -> dict[str, str]:
    """The expected `skipped`, with the number of tokens filled in."""
    return {path: reason.format(tokens=family.grid(size).num_tokens) for path, reason in family.skipped.items()}


def check_fast_path(family: Family) -> None:
    """Check that the untouched model calls no fused attention, and that hooks record all layers nevertheless."""
    model, images = family.model(), family.images()
    with torch.no_grad():
        with mock.patch.object(F, "scaled_dot_product_attention", side_effect=AssertionError):
            untouched = model(images)
        result, recorded, *_ = hooked(model, images)
    assert sorted(recorded.layers) == [0, 1]
    assert (result - untouched).abs().max() < 1e-5


class FamilyChecks:
    """Attention, output and distances for one image size, and token positions for all sizes."""

    @pytest.mark.parametrize("tile_bytes", [1, 3000, 4 << 20])
    def test_attention_and_output_equal_the_librarys_unfused_attention(self, family: Family, tile_bytes: int) -> None:
        attention, result = deviation(family, tile_bytes=tile_bytes)
        assert attention < TOLERANCE
        assert result < TOLERANCE

    def test_output_equals_the_untouched_models_and_no_hooks_remain(self, family: Family) -> None:
        model, images = family.model(), family.images()
        assert torch.backends.mha.get_fastpath_enabled()
        with torch.no_grad():
            untouched = output(model(images))
            with leaves_nothing(model):
                result, *_, skipped_modules = hooked(model, images, verify=True)
        assert (result - untouched).abs().max() < TOLERANCE
        assert skipped_modules == skipped(family)

    def test_grid_and_windows_are_the_librarys_own(self, family: Family) -> None:
        for size in family.sizes:
            model = family.model(size)
            with leaves_nothing(model):
                layout = locate_tokens(model, *size)
            assert layout.grid == family.grid(size)
            assert (tuple(layout.layers), layout.skipped) == (family.layers, skipped(family, size))
            expected_windows = family.windows(model, size)
            assert sorted(layout.windows) == sorted(expected_windows)
            for layer, windows in layout.windows.items():
                expected = expected_windows[layer]
                assert (windows.grid.rows, windows.grid.cols) == (expected.rows, expected.cols)
                assert windows.grid.patch_size == expected.patch_size
                assert windows.patches.equal(expected.patches)
                no_pairs = torch.zeros(*expected.patches.shape, expected.patches.shape[1], dtype=torch.bool)
                assert (no_pairs if windows.masked_pairs is None else windows.masked_pairs).equal(
                    no_pairs if expected.masked_pairs is None else expected.masked_pairs
                )

    @pytest.mark.parametrize("prefix", ["renormalize", "drop"])
    def test_distance_equals_that_of_the_librarys_unfused_attention(self, family: Family, prefix: reference.Prefix) -> None:
        size = family.sizes[0]
        model, images = family.model(), family.images()
        result = mean_attention_distance(model, images, prefix=prefix, batch_size=1)
        windows = locate_tokens(model, *size).windows
        measure = mean_attention_distance.observer(family.grid(), prefix=prefix, windows=windows)
        with torch.no_grad():
            unfused = family.unfused(model, images, family.layers)
            with attention_hooks(model, measure, tile_bytes=3000):
                model(images)
        table, tiled = result.to_dataframe(), measure.compute().to_dataframe()
        assert table.attrs["skipped"] == skipped(family)
        for layer, layout in enumerate(reference.layouts(family, model, size)):
            expected = reference.attention_distance(unfused.maps[family.layers[layer]], layout, prefix)
            for frame in (table[table.layer == layer], tiled[tiled.layer == layer]):
                assert set(frame.module) == {family.layers[layer]}
                np.testing.assert_allclose(frame.distance, expected.distance, rtol=0, atol=1e-4)
                np.testing.assert_allclose(frame["std"], expected.std, rtol=0, atol=1e-4)
                np.testing.assert_allclose(frame.patch_mass, expected.patch_mass, rtol=0, atol=TOLERANCE)
                np.testing.assert_allclose(frame.uniform_distance, expected.uniform, rtol=1e-9)
                assert set(frame.num_windows) == {len(layout.patches)}


class PrecisionChecks:
    """Gradients, lower precision, compiled models."""

    def test_gradients_equal_those_without_hooks(self, family: Family) -> None:
        model, images = family.model(), family.images()
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def gradients() -> list[Tensor]:
            return torch.autograd.grad(output(model(images)).sin().sum(), weights, materialize_grads=True)

        untouched = gradients()
        with attention_hooks(model, recorded := Assemble()):
            with_hooks = gradients()
        assert sorted(recorded.layers) == list(range(len(family.layers)))
        assert sum(bool(gradient.abs().max() > 1e-3) for gradient in untouched) > 10
        for ours, theirs in zip(with_hooks, untouched, strict=True):
            assert (ours - theirs).abs().max() <= TOLERANCE * max(1.0, float(theirs.abs().max()))

    @pytest.mark.parametrize("kind", ["autocast", "half", "bfloat16"])
    def test_lower_precision(self, family: Family, kind: str) -> None:
        model, images = family.model(), family.images()
        dtype = torch.float16 if kind == "half" else torch.bfloat16
        if kind != "autocast":
            model, images = model.to(dtype), images.to(dtype)
        autocast = kind == "autocast"
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            with without_fast_path() if autocast else nullcontext():  # torch's fast path ignores autocast on the CPU
                untouched = output(model(images))
            result, recorded, *_ = hooked(model, images)
        assert result.dtype == untouched.dtype
        for layer, attention in hooked(family.model(), family.images())[1].layers.items():  # in float32
            assert abs(recorded.layers[layer] - attention).mean() < 0.1 * attention.mean()
        assert (result - untouched).abs().max() <= _TOLERANCE_OF_DTYPE[dtype] * untouched.abs().max()

    def test_all_layers_of_compiled_models_are_recorded(self, family: Family) -> None:
        model, images = family.model(), family.images()
        with torch.no_grad():
            _, expected, *_ = hooked(model, images)
            compiled = torch.compile(model, backend="eager")
            compiled(images)
            for _ in range(2):
                _, recorded, layers, _ = hooked(compiled, images)
                assert [name.removeprefix("_orig_mod.") for name in layers] == list(family.layers)
                for layer, attention in expected.layers.items():
                    np.testing.assert_allclose(recorded.layers[layer], attention, rtol=0, atol=TOLERANCE)
        torch.compiler.reset()
