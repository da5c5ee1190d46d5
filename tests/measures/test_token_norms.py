"""Norms of tokens: any split of the images, and artifacts exactly where they are planted."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.example_models import FAMILIES, images, small_vit, swin
from tests.measures.tiles import Tokens
from vit_probe import InputError, load_result
from vit_probe.measures.token_norms import TokenNorms, TokenNormsResult, token_norms
from vit_probe.runner.run import AttentionRun
from vit_probe.tokens.grid import TokenGrid

NAMES = ["blocks.0.attn", "blocks.1.attn"]
BIN = 2 ** (1 / 128)


def streaming(names: list[str], patches: int) -> TokenNorms:
    """The measure of layers with so many patches, in as many rows and columns as come closest to a square."""
    rows = max(row for row in range(1, math.isqrt(patches) + 1) if patches % row == 0)
    return TokenNorms(names, [TokenGrid(rows, patches // rows, (4, 4), 0, False)] * len(names))


def feed(measure: TokenNorms, layers: list[Tensor], parts: int | list[int] | None = None) -> TokenNorms:
    """Show the tokens (image, patch, dim) of every layer, in batches of `parts` images."""
    for batch in zip(*(layer.split(parts or len(layer)) for layer in layers), strict=True):
        measure.begin_batch()
        for number, tokens in enumerate(batch):
            measure.update_tokens(number, tokens)
        measure.end_batch()
    return measure


def tokens_of(norms: np.ndarray, dim: int = 5, seed: int = 0) -> Tensor:
    """Tokens in random directions with these norms (image, patch)."""
    directions = np.random.default_rng(seed).normal(size=(*norms.shape, dim))
    return torch.tensor(directions / np.linalg.norm(directions, axis=-1, keepdims=True) * norms[..., None])


def planted(part: float, *, factor: float = 8.0, spread: float = 0.15, count: int = 20000, seed: int = 0) -> np.ndarray:
    """Log-normal norms (image, patch) around 30 of 100 images; the share `part` is `factor` times as large."""
    random = np.random.default_rng(seed)
    norms = 30 * np.exp(random.normal(0, spread, count))
    norms[: round(part * count)] *= factor
    return random.permutation(norms).reshape(100, -1)


def compute(*layers: np.ndarray, **options: Any) -> TokenNormsResult:
    names = [f"blocks.{number}.attn" for number in range(len(layers))]
    return feed(streaming(names, layers[0].shape[1]), [tokens_of(norms) for norms in layers], **options).compute()


# The norms


@pytest.mark.parametrize("name", ["ours", "timm-registers", "transformers-dinov2", "encoder"])
def test_the_norms_are_those_of_the_tokens(name: str) -> None:
    model, x = FAMILIES[name].model(), FAMILIES[name].images(4)
    AttentionRun(model, x, device="cpu").observe(seen := Tokens())
    result = token_norms(model, x, batch_size=3, device="cpu")
    frame = result.to_dataframe()
    for layer in range(2):
        norms = np.sqrt((seen.of(layer).astype(np.float64) ** 2).sum(-1)).ravel()
        assert frame["tokens"][layer] == norms.size
        expected, _ = np.histogram(norms, result.edges)
        assert np.abs(result.counts[layer] - expected).sum() <= 4  # at the edge of a bin
        for column, quantile in (("lowest", 0.0), ("median", 0.5), ("highest", 1.0)):
            exact = np.quantile(norms, quantile, method="inverted_cdf")
            assert frame[column][layer] == pytest.approx(exact, rel=0.004)
        assert frame["typical_norm"][layer] == pytest.approx(np.exp(np.log(norms).mean()), rel=0.3)


@settings(max_examples=30, deadline=None)
@given(
    parts=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    cut=st.integers(0, 5),
    order=st.randoms(use_true_random=False),
)
def test_any_split_and_any_merging_gives_the_same(parts: list[int], cut: int, order: Random) -> None:
    total = sum(parts)
    random = torch.Generator().manual_seed(total)
    layers = [torch.randn(total, 7, 3, generator=random) * scale for scale in (1.0, 50.0)]
    whole = feed(streaming(NAMES, 7), layers).compute()
    bounds = np.cumsum([0, *parts])
    shards = [
        feed(streaming(NAMES, 7), [layer[start:stop] for layer in layers], [int(stop - start)])
        for start, stop in pairwise(bounds)
    ]
    shards.append(streaming(NAMES, 7))  # has seen nothing
    order.shuffle(shards)
    again = streaming(NAMES, 7)
    again.restore(shards[cut % len(shards)].state())
    shards[cut % len(shards)] = again
    for shard in shards[1:]:
        shards[0].merge(shard)
    result = shards[0].compute()
    assert result.num_images == total
    for name, value in vars(whole).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(result, name), value)


def test_a_batch_that_is_rolled_back_does_not_count() -> None:
    layers = [torch.ones(2, 3, 4), torch.ones(2, 3, 4)]
    measure = feed(streaming(NAMES, 3), layers)
    measure.begin_batch()
    measure.update_tokens(0, 9 * layers[0])
    measure.update_tokens(1, 9 * layers[1])
    measure.end_batch()
    measure.roll_back()  # as when memory ends in another measure's end_batch
    assert measure.compute().num_images == 2
    result = feed(measure, layers).compute()
    assert result.num_images == 4
    assert result.counts.tolist() == [[12], [12]]
    np.testing.assert_allclose(np.log2(result.edges), [1.0, 1 + 1 / 128])


@settings(max_examples=30, deadline=None)
@given(exponent=st.floats(-15.9, 19.9), dim=st.integers(1, 9))
def test_a_norm_lies_in_its_bin(exponent: float, dim: int) -> None:
    norm = 2.0**exponent
    result = compute(np.full((1, 1), norm))
    low, high = result.edges
    assert low * 0.9999 <= norm <= high * 1.0001
    assert high / low == pytest.approx(BIN)


def test_norms_outside_are_counted_at_the_ends() -> None:
    result = compute(np.array([[0.0, 1e-9, 1e9]]))
    assert result.counts[0, [0, -1]].tolist() == [2, 1]
    np.testing.assert_allclose(result.edges[[0, -1]], [2.0**-16, 2.0**20])


def test_half_precision_does_not_overflow() -> None:
    result = feed(streaming(NAMES[:1], 2), [torch.full((1, 2, 400), 6e4, dtype=torch.float16)]).compute()
    assert result.to_dataframe()["median"][0] == pytest.approx(6e4 * 20, rel=0.2)  # the last bin ends at 2^20


def test_layers_with_merged_patches() -> None:
    attention = AttentionRun(swin(), images(48, 48), device="cpu")
    attention.observe(measure := token_norms.spec.start(attention))
    assert measure.compute().to_dataframe()["tokens"].tolist() == [3 * 144, 3 * 144, 3 * 36, 3 * 36]
    assert measure.state()["counts"][2].sum(axis=1).tolist() == [3 * 2 * 12 * 11] * 2 + [3 * 2 * 6 * 5] * 2  # pairs


# Artifacts


@pytest.mark.parametrize("part", [0.01, 0.02, 0.1, 0.2])
def test_planted_artifacts_are_found(part: float) -> None:
    plain, norms = planted(0), planted(part)
    result = compute(plain, norms)
    frame = result.to_dataframe()
    assert frame["artifacts"][0] == 0
    assert np.isnan(frame["threshold"][0])
    assert np.isnan(frame["artifact_norm"][0])
    assert frame["artifacts"][1] == pytest.approx(part, abs=1e-4)
    assert 60 < frame["threshold"][1] < 180
    assert frame["artifacts"][1] == (norms > frame["threshold"][1]).mean()
    assert frame["artifact_images"][1] == (norms > frame["threshold"][1]).any(1).mean()
    assert frame["artifact_images"][0] == 0
    assert frame["typical_norm"][1] == pytest.approx(30, rel=0.02)
    assert frame["artifact_norm"][1] == pytest.approx(240, rel=0.05)
    assert frame["artifact_neighbours"][1] == pytest.approx(part * 2 * 370 / 200, abs=0.05)  # 10 x 20 patches make 370 pairs
    assert frame["valley_depth"][1] > 3.5 > frame["valley_depth"][0]


@pytest.mark.parametrize("factors", [(8, 20), (8, 12), (8, 16)])
def test_artifacts_of_two_kinds_are_found(factors: tuple[int, int]) -> None:
    """Although there is a valley between them, too."""
    norms = planted(0).ravel()
    for number, factor in enumerate(factors):
        norms[number * 60 : (number + 1) * 60] *= factor
    norms = np.random.default_rng(1).permutation(norms).reshape(100, -1)
    result = compute(norms)
    assert result.artifacts[0] == pytest.approx(120 / 20000, abs=5e-4)
    assert 45 < result.threshold[0] < 100


@pytest.mark.parametrize(("count", "found"), [(8, False), (40, True)])
def test_few_artifacts(count: int, found: bool) -> None:
    norms = planted(0).ravel()[:2048].reshape(8, 256)
    norms[:, 0 : 51 * (count // 8) : 51] *= 8
    result = compute(norms)
    assert result.artifacts[0] == (count / 2048 if found else 0)


def test_norms_of_zero_hide_no_artifacts() -> None:
    norms = planted(0.05)
    plain, few, many = compute(norms), norms.copy(), norms.copy()
    few[0, 0] = 0
    many[:, :20] = 0
    for some in (few, many):
        result = compute(some)
        assert result.artifacts[0] == (some > result.threshold[0]).mean()
        assert result.artifacts[0] == pytest.approx(0.05 * (some > 0).mean(), abs=2e-3)
        assert result.artifact_norm[0] == pytest.approx(plain.artifact_norm[0], rel=0.01)
    assert compute(np.zeros((3, 4))).artifacts.tolist() == [0.0]


def test_neighbours_are_counted_on_the_grid() -> None:
    norms = planted(0, count=2400).reshape(2, 12, 100)
    norms[0, :6] = 2.0  # more bins, all in one place
    norms = norms.reshape(24, 10, 10)
    measure = feed(streaming(NAMES[:1], 100), [tokens_of(norms.reshape(24, 100))], [5, 7, 12])
    bins = np.floor((np.log2(norms) + 16) * 128).astype(int)
    expected = np.zeros(36 * 128, dtype=int)
    for image, row, col in np.ndindex(norms.shape):
        for other_row, other_col in ((row + 1, col), (row, col + 1)):
            if other_row < 10 and other_col < 10:
                expected[min(bins[image, row, col], bins[image, other_row, other_col])] += 1
    assert np.abs(measure.state()["counts"][2, 0] - expected).sum() <= 4  # at the edge of a bin


@pytest.mark.parametrize(("images", "found"), [(3, False), (20, False), (30, True), (100, True)])
def test_artifacts_are_in_many_images(images: int, found: bool) -> None:
    """In few images, the same tokens are part of what these images show."""
    norms = planted(0)
    norms[:images, ::21] *= 8  # a diagonal
    result = compute(norms)
    assert result.artifacts[0] == (images * 10 / 20000 if found else 0)
    assert result.artifact_images[0] == (images / 100 if found else 0)


@settings(max_examples=15, deadline=None)
@given(factor=st.floats(0.01, 100), seed=st.integers(0, 20))
def test_a_factor_moves_the_norms_alone(factor: float, seed: int) -> None:
    norms = planted(0.04, seed=seed, count=5000)
    one, other = compute(norms), compute(factor * norms)
    np.testing.assert_allclose(other.artifacts, one.artifacts, atol=1e-3)
    np.testing.assert_allclose(other.threshold, factor * one.threshold, rtol=0.03)


# The result


@pytest.fixture(scope="module")
def result() -> TokenNormsResult:
    return compute(planted(0), planted(0.02))


def test_dataframe_and_summary_have_one_row_per_layer(result: TokenNormsResult) -> None:
    frame = result.to_dataframe()
    assert list(frame) == [
        *("layer", "module", "tokens", "lowest", "median", "highest", "threshold", "artifacts", "artifact_images"),
        *("typical_norm", "artifact_norm", "artifact_neighbours", "valley_depth", "num_images"),
    ]
    assert frame["module"].tolist() == NAMES
    assert frame["num_images"].tolist() == [100, 100]
    summary = result.summary()
    assert summary["layer"].tolist() == [0, 1]
    np.testing.assert_allclose(summary["artifacts (%)"], 100 * result.artifacts)


@pytest.mark.parametrize("bins", [1, 8, 128])
def test_histogram_counts_all_tokens_in_bins_of_any_width(result: TokenNormsResult, bins: int) -> None:
    frame = result.histogram(bins)
    assert list(frame) == ["layer", "module", "norm_from", "norm_to", "tokens", "part"]
    edges = np.append(frame["norm_from"][frame["layer"] == 0], frame["norm_to"].iloc[-1])
    np.testing.assert_allclose(np.log2(edges) * bins, np.round(np.log2(edges[0]) * bins) + np.arange(len(edges)), atol=1e-9)
    for layer, norms in enumerate((planted(0), planted(0.02))):
        mine = frame[frame["layer"] == layer]
        assert np.abs(mine["tokens"] - np.histogram(norms, edges)[0]).sum() <= 4
        assert mine["tokens"].sum() == 20000
        assert mine["part"].sum() == pytest.approx(1)
        assert set(mine["module"]) == {NAMES[layer]}


def test_saved_and_read_back(result: TokenNormsResult, tmp_path: Path) -> None:
    again = load_result(result.save(tmp_path / "norms.safetensors"))
    assert isinstance(again, TokenNormsResult)
    assert again.to_dataframe().equals(result.to_dataframe())
    assert again.histogram().equals(result.histogram())


def test_plot_draws_on_the_axes_given(result: TokenNormsResult) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert result.plot(ax=axes) is axes


def test_provenance_of_a_model() -> None:
    result = token_norms(small_vit(), images(), device="cpu")
    assert result.provenance["layers"] == result.modules == NAMES
    assert result.provenance["options"] == {}


# Errors


def test_nothing_measured() -> None:
    with pytest.raises(InputError, match="no token norms have been measured yet"):
        streaming(NAMES, 4).compute()


def test_bins_that_do_not_divide(result: TokenNormsResult) -> None:
    with pytest.raises(InputError, match="bins_per_octave must divide 128, got 10"):
        result.histogram(10)


def test_norms_that_are_not_finite() -> None:
    with pytest.raises(InputError, match="token norms are not all finite"):
        compute(np.full((1, 4), np.nan))


def test_measures_of_other_layers_are_not_merged() -> None:
    with pytest.raises(InputError, match=r"cannot merge token norms: 1 layers with the options \{\} and 2 layers"):
        streaming(NAMES, 4).merge(streaming(NAMES[:1], 4))
