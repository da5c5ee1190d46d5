"""Centred kernel alignment: the literal reference, closed forms, and pairs of different models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import reference
from tests.example_models import FAMILIES, Hungry, images, small_vit, swin
from tests.measures.tiles import Tokens
from vit_probe import InputError, Preprocessing, load_result
from vit_probe.errors import AssumptionWarning
from vit_probe.measures.hsic import centred_pairs, inner_products
from vit_probe.measures.representation_similarity import (
    RepresentationSimilarity,
    RepresentationSimilarityResult,
    representation_similarity,
)
from vit_probe.runner.run import AttentionRun

literal = reference.centred_kernel_alignment
NAMES = ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]


def feed(measure: RepresentationSimilarity, layers: list[Tensor], sizes: list[int] | None = None) -> RepresentationSimilarity:
    """Show the tokens (image, patch, dim) of every layer, in batches of these sizes."""
    for batch in zip(*(layer.split(sizes or [len(layer)]) for layer in layers), strict=True):
        measure.begin_batch()
        for number, tokens in enumerate(batch):
            measure.update_tokens(number, tokens)
        measure.end_batch()
    return measure


def random_layers(count: int, *, seed: int = 0, dims: tuple[int, ...] = (5, 3, 4), offset: float = 0.0) -> list[Tensor]:
    """Random layers with a common part and a part of their own."""
    random = torch.Generator().manual_seed(seed)
    shared = torch.randn(count, 6, 1, generator=random)
    return [shared + torch.randn(count, 6, dim, generator=random) + offset for dim in dims]


def similarity(layers: list[Tensor], sizes: list[int] | None = None) -> np.ndarray:
    measure = RepresentationSimilarity([f"layer {number}" for number in range(len(layers))])
    return feed(measure, layers, sizes).compute().similarity


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4).filter(lambda sizes: max(sizes) > 3), seed=st.integers(0, 99))
def test_the_numbers_are_songs(sizes: list[int], seed: int) -> None:
    layers = random_layers(sum(sizes), seed=seed)
    expected = literal(*[[layer.numpy() for layer in layers]] * 2, sizes)
    measure = feed(RepresentationSimilarity(NAMES), layers, sizes)
    result = measure.compute()
    np.testing.assert_allclose(result.similarity, expected, rtol=1e-5, atol=1e-6)
    assert result.num_images == sum(size for size in sizes if size >= 4)
    assert result.num_batches == sum(size >= 4 for size in sizes)
    assert result.num_left_out == sum(size for size in sizes if size < 4)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(4, 9), seed=st.integers(0, 99))
def test_the_estimate_is_songs(count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    one, other = (matrix @ matrix.T for matrix in random.normal(size=(2, count, 6)))
    mine = centred_pairs(one) @ centred_pairs(other)
    assert mine == pytest.approx(count * reference.unbiased_hsic(one, other), rel=1e-9, abs=1e-9)


def test_inner_products_of_tokens_less_the_first_images() -> None:
    tokens = random_layers(5)[0]
    expected = reference.linear_kernel((tokens - tokens[:1]).numpy())
    np.testing.assert_allclose(inner_products(tokens), expected, rtol=1e-6)
    np.testing.assert_allclose(inner_products(tokens.transpose(1, 2).contiguous().transpose(1, 2)), expected, rtol=1e-6)


def test_products_of_many_numbers_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_layers(5)[0]
    whole = inner_products(tokens)
    monkeypatch.setattr("vit_probe.measures.hsic._CHUNK_SIZE", 26)
    np.testing.assert_allclose(inner_products(tokens), whole, rtol=1e-12)


def test_a_large_common_offset_costs_no_precision() -> None:
    layers = [layer.double() for layer in random_layers(12)]
    far = [(layer + 1000 * torch.arange(layer.shape[2])).float() for layer in layers]
    np.testing.assert_allclose(similarity(far), similarity(layers), atol=2e-4)


# Closed forms


def test_a_layer_is_like_itself_rotated_and_scaled() -> None:
    tokens = random_layers(10)[0].double()
    rotation, _ = torch.linalg.qr(torch.randn(30, 30, generator=torch.Generator().manual_seed(1)).double())
    rotated = (tokens.flatten(1) @ rotation).view(10, 5, 6)
    found = similarity([tokens, 3 * tokens, rotated, tokens + 7], [4, 6])
    np.testing.assert_allclose(found, 1, rtol=1e-9)
    stretched = tokens * torch.tensor([1, 1, 1, 1, 50])
    assert similarity([tokens, stretched])[0, 1] < 0.95  # not invariant to what is not a rotation


def test_order_within_a_batch_is_of_no_consequence() -> None:
    layers = random_layers(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(similarity([layer[order] for layer in layers]), similarity(layers), atol=1e-6)


def test_unrelated_layers_are_unlike_on_average() -> None:
    """The estimator has no bias; the biased one would be close to 1 with so many dimensions."""
    random = torch.Generator().manual_seed(0)
    layers = [torch.randn(2000, 1, 400, generator=random) for _ in range(2)]
    assert abs(similarity(layers, [8] * 250)[0, 1]) < 0.05


def test_batches_estimate_what_the_whole_does() -> None:
    layers = random_layers(600)
    whole, batches = similarity(layers), similarity(layers, [12] * 50)
    assert whole[0, 1] < 0.9
    np.testing.assert_allclose(batches, whole, atol=0.03)


def test_the_matrix_is_symmetric_and_at_most_one() -> None:
    found = similarity(random_layers(12), [4, 8])
    np.testing.assert_allclose(found, found.T, rtol=1e-12)
    np.testing.assert_allclose(found.diagonal(), 1)
    assert found.max() <= 1 + 1e-12


# Models


@pytest.mark.parametrize("name", ["ours", "timm-registers", "transformers-siglip", "encoder"])
def test_of_models(name: str) -> None:
    model, x = FAMILIES[name].model(), FAMILIES[name].images(10)
    AttentionRun(model, x, device="cpu").observe(seen := Tokens())
    result = representation_similarity(model, x, batch_size=5, device="cpu")
    layers = [seen.of(0), seen.of(1)]
    np.testing.assert_allclose(result.similarity, literal(layers, layers, [5, 5]), atol=1e-5)
    assert 0.1 < result.similarity[0, 1] < 0.999


@pytest.mark.parametrize("sizes", [[9], [4, 5], [6, 3]])
def test_between_two_models(sizes: list[int]) -> None:
    """Of another depth, width, patch size and library; one merges patches."""
    x = images(48, 48, batch=9)
    models = [small_vit(image_size=48, patch_size=8, depth=3), swin()]
    kept = []
    for model in models:
        AttentionRun(model, x, device="cpu").observe(seen := Tokens())
        kept.append([seen.of(layer) for layer in range(len(seen.layers))])
    result = representation_similarity(models[0], list(x.split(sizes)), models[1], device="cpu")
    assert result.similarity.shape == (3, 4)
    np.testing.assert_allclose(result.similarity, literal(*kept, sizes), atol=1e-5)
    assert result.modules == NAMES
    assert result.other_modules[0] == "encoder.layers.0.blocks.0.attention"
    assert result.provenance["other"]["layers"] == result.other_modules
    assert result.provenance["layers"] == NAMES


def test_a_model_beside_itself_is_as_within_itself() -> None:
    model, x = small_vit(depth=3), images(batch=10)
    within = representation_similarity(model, x, batch_size=4, device="cpu")
    beside = representation_similarity(model, x, model, batch_size=4, device="cpu")
    np.testing.assert_allclose(beside.similarity, within.similarity, rtol=1e-9)
    assert (within.num_images, within.num_left_out) == (8, 2)
    assert "other" not in within.provenance


def test_photographs_are_prepared_for_each_model() -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    photographs = [Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(6)]
    small, large = small_vit(), small_vit(image_size=(32, 36))
    small.preprocessing, large.preprocessing = Preprocessing((24, 24), resize=24), Preprocessing((32, 36), resize=40)
    kept = []
    for model in (small, large):
        x = torch.stack([model.preprocessing(photograph) for photograph in photographs])
        AttentionRun(model, x, device="cpu").observe(seen := Tokens())
        kept.append([seen.of(0), seen.of(1)])
    result = representation_similarity(small, photographs, large, device="cpu")
    np.testing.assert_allclose(result.similarity, literal(*kept, [6]), atol=1e-5)


# Splitting, merging, memory


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5).filter(lambda sizes: max(sizes) > 3), data=st.data())
def test_any_merging_gives_the_same(sizes: list[int], data: st.DataObject) -> None:
    layers, others = random_layers(sum(sizes)), random_layers(sum(sizes), seed=5)
    cut = data.draw(st.integers(0, len(sizes)))
    at = sum(sizes[:cut])

    def shards(layers: list[Tensor]) -> RepresentationSimilarity:
        merged = RepresentationSimilarity(NAMES, keep=True)
        for part, chosen in ((sizes[:cut], slice(at)), (sizes[cut:], slice(at, None))):
            shard = RepresentationSimilarity(NAMES, keep=True)
            again = RepresentationSimilarity(NAMES, keep=True)
            if part:
                feed(shard, [layer[chosen] for layer in layers], part)
            again.restore(shard.state())
            merged.merge(again)
        return merged

    mine, theirs = shards(layers), shards(others)
    whole, beside = (feed(RepresentationSimilarity(NAMES, keep=True), one, sizes) for one in (layers, others))
    np.testing.assert_allclose(mine.compute().similarity, whole.compute().similarity, rtol=1e-12)
    between = mine.compute(other=theirs)
    np.testing.assert_allclose(between.similarity, whole.compute(other=beside).similarity, rtol=1e-12)
    assert between.num_left_out == sum(size for size in sizes if size < 4)


def test_a_batch_that_is_taken_back_does_not_count() -> None:
    layers = random_layers(8)
    measure = feed(RepresentationSimilarity(NAMES, keep=True), layers)
    before = measure.state()
    measure.begin_batch()
    for layer, tokens in enumerate(layers):
        measure.update_tokens(layer, tokens.flip(0, 1) ** 2)
    measure.end_batch()
    assert measure.state()["sizes"] != before["sizes"]
    measure.roll_back()  # as when memory ends in another measure's end_batch
    np.testing.assert_equal(measure.state(), before)


def observed(model: nn.Module, x: Any, **options: Any) -> RepresentationSimilarity:
    attention = AttentionRun(model, x, device="cpu", **options)
    attention.observe(measure := RepresentationSimilarity(attention.layers, keep=True))
    return measure


def test_what_memory_does_not_hold_is_halved() -> None:
    x = images(batch=16)
    with pytest.warns(AssumptionWarning, match="out of memory with a batch of 16 images"):
        halved = observed(Hungry(4), x, batch_size=16)
    expected = observed(small_vit(), x, batch_size=4)
    np.testing.assert_allclose(halved.compute().similarity, expected.compute().similarity, atol=1e-5)
    with pytest.raises(InputError, match=r"batches of 4, 4, 4, 4 and 16 images; show both the same images, in batches that"):
        halved.compute(other=observed(small_vit(), x, batch_size=16))
    with (
        pytest.warns(AssumptionWarning),
        pytest.raises(
            InputError, match="out of memory with a batch of 4 images, but every measure needs at least 4 images per batch"
        ),
    ):
        representation_similarity(Hungry(2), x, device="cpu")


def test_interrupted_and_gone_on_with(tmp_path: Path) -> None:
    x, state = images(batch=14), tmp_path / "state"

    told: list[int] = []

    def interrupt(count: int) -> None:
        told.append(count)
        if len(told) == 3:
            raise KeyboardInterrupt

    first = AttentionRun(small_vit(), x, batch_size=4, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        first.observe(RepresentationSimilarity(first.layers, keep=True), progress=interrupt, state=state, every=1)
    again = AttentionRun(small_vit(), x, batch_size=4, device="cpu")
    again.observe(measure := RepresentationSimilarity(again.layers, keep=True), state=state, progress=told.append)
    assert told == [4, 4, 4, 12, 2]
    other = AttentionRun(small_vit(), x, batch_size=4, device="cpu")
    with pytest.raises(InputError, match="another run, which differs in its measures"):
        other.observe(RepresentationSimilarity(other.layers), state=state)
    expected = observed(small_vit(), x, batch_size=4)
    for one, whole in ((measure.compute(), expected.compute()), (measure.compute(other=measure), expected.compute())):
        np.testing.assert_allclose(one.similarity, whole.similarity, rtol=1e-9)
        assert one.num_left_out == 2


# The result


@pytest.fixture(scope="module")
def result() -> RepresentationSimilarityResult:
    return representation_similarity(small_vit(depth=3), images(batch=8), device="cpu")


def test_dataframe_has_a_row_a_pair(result: RepresentationSimilarityResult) -> None:
    frame = result.to_dataframe()
    assert list(frame) == ["layer", "module", "other_layer", "other_module", "similarity", "num_images"]
    assert len(frame) == 9
    row = frame[(frame.layer == 2) & (frame.other_layer == 1)].iloc[0]
    assert row.similarity == result.similarity[2, 1]
    assert (row.module, row.other_module) == (NAMES[2], NAMES[1])


def test_summary_leaves_the_layer_itself_out(result: RepresentationSimilarityResult) -> None:
    summary = result.summary()
    assert summary["layer"].tolist() == [0, 1, 2]
    off = [np.delete(row, index) for index, row in enumerate(result.similarity)]
    np.testing.assert_allclose(summary["similarity"], [row.max() for row in off])
    np.testing.assert_allclose(summary["mean"], [row.mean() for row in off])
    np.testing.assert_allclose(summary["lowest"], [row.min() for row in off])
    model = small_vit(depth=3)
    beside = representation_similarity(model, images(batch=8), model, device="cpu").summary()
    assert beside["most like"].tolist() == [0, 1, 2]
    np.testing.assert_allclose(beside["similarity"], 1)


def test_saved_and_read_back(result: RepresentationSimilarityResult, tmp_path: Path) -> None:
    again = load_result(result.save(tmp_path / "similarity.safetensors"))
    assert isinstance(again, RepresentationSimilarityResult)
    assert again.to_dataframe().equals(result.to_dataframe())
    assert again.provenance["options"] == {"keep": False}


def test_plot_draws_on_the_axes_given(result: RepresentationSimilarityResult) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert result.plot(ax=axes) is axes


# Errors


def test_batches_that_are_too_small() -> None:
    with pytest.raises(InputError, match=r"needs batches of 4 images or more, got batch_size=3"):
        representation_similarity(small_vit(), images(batch=8), batch_size=3)
    with pytest.raises(InputError, match=r"no batch of 4 images or more has been measured yet; 3 images came in smaller ones"):
        representation_similarity(small_vit(), images(batch=3), device="cpu")
    with pytest.raises(InputError, match=r"no batch of 4 images or more has been measured yet$"):
        RepresentationSimilarity(NAMES).compute()


def test_images_that_can_be_had_once_only() -> None:
    model = small_vit()
    with pytest.raises(InputError, match="a generator yields them only once; pass a list, a tensor"):
        representation_similarity(model, (images() for _ in range(2)), model)


def test_images_that_come_otherwise_the_second_time() -> None:
    class Shuffled:
        """Batches in another order each time they are read."""

        times = 0

        def __iter__(self) -> Any:
            self.times += 1
            return iter([images(batch=4, seed=self.times), images(batch=4, seed=0)])

    model = small_vit()
    with pytest.raises(InputError, match="were shown 8 and 8 images, not the same in the same order; pass images that"):
        representation_similarity(model, Shuffled(), model, device="cpu")


def test_images_that_are_all_alike() -> None:
    """Or all but one: the pairs of the others leave nothing but rounding."""
    tokens = torch.randn(1, 2, 3).repeat(5, 1, 1)
    for third in (tokens[1].clone(), torch.randn(2, 3)):
        tokens[2] = third
        measure = feed(RepresentationSimilarity(NAMES[:1]), [tokens])
        message = r"all images of each batch, or all but one, have the same tokens in layer 0 \(blocks.0.attn\); there is"
        with pytest.raises(InputError, match=message):
            measure.compute()


def test_tokens_that_are_not_finite() -> None:
    with pytest.raises(InputError, match=r"tokens of layer 0 \(blocks.0.attn\) are not all finite"):
        feed(RepresentationSimilarity(["blocks.0.attn"]), torch.full((1, 4, 12, 16), torch.nan))


def test_what_was_not_kept_cannot_be_compared() -> None:
    kept, layers = feed(RepresentationSimilarity(NAMES, keep=True), random_layers(4)), random_layers(4)
    with pytest.raises(InputError, match="batches must be kept to be compared with those of another model; measure both with"):
        kept.compute(other=feed(RepresentationSimilarity(NAMES), layers))
    with pytest.raises(
        InputError, match=r"cannot merge representation similarities: 3 layers with the options .*'keep': False"
    ):
        kept.merge(RepresentationSimilarity(NAMES))
