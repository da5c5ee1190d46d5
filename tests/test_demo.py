"""The bundled model is small enough to ship, and has the properties of a trained ViT that its card states."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.fft import dctn

from analyses.small_images import read_split
from analyses.train_demo import initialise
from analyses.training import accuracy
from vit_probe import (
    VisionTransformer,
    attention_rollout,
    load_model,
    mean_attention_distance,
    patch_filters,
    position_similarity,
    sample_photographs,
)

ROOT = Path(__file__).resolve().parents[1]
SHEETS = ROOT.parent / "shared" / "tiny-imagenet-100"
CARD = (ROOT / "vit_probe" / "demo" / "README.md").read_text()


@pytest.fixture(scope="module")
def demo() -> VisionTransformer:
    return load_model("demo")


@pytest.fixture(scope="module")
def untrained(demo: VisionTransformer) -> VisionTransformer:
    """The same architecture with the weights that training starts from."""
    torch.manual_seed(0)
    model = initialise(VisionTransformer(replace(demo.config, num_classes=1000)).replace_head(100)).eval()
    model.preprocessing = demo.preprocessing
    return model


@pytest.fixture(scope="module")
def distances(demo: VisionTransformer) -> pd.DataFrame:
    return mean_attention_distance(demo, sample_photographs(32)).to_dataframe()


def similarity_by_distance(model: VisionTransformer) -> tuple[np.ndarray, np.ndarray]:
    """For every pair of different patches: their distance in patches, and the similarity of their position embeddings."""
    rows, cols = model.config.grid_size(*model.config.image_size)  # type: ignore[misc]
    similarity = position_similarity(model).similarity.reshape(rows * cols, -1)
    coordinates = np.stack(np.divmod(np.arange(rows * cols), cols), axis=1)
    distance = np.linalg.norm(coordinates[:, None] - coordinates[None], axis=-1)
    different = ~np.eye(rows * cols, dtype=bool)
    return distance[different], similarity[different]


def smoothness(model: VisionTransformer) -> float:
    """Share of the variance of the first 28 filter components in the lowest quarter of spatial frequencies, except 0."""
    filters = patch_filters(model).filters
    spectrum = (dctn(filters, axes=(2, 3), norm="ortho") ** 2).sum(axis=(0, 1))
    spectrum[0, 0] = 0
    return float(spectrum[:4, :4].sum() / spectrum.sum())


def test_size_and_preprocessing(demo: VisionTransformer) -> None:
    assert (ROOT / "vit_probe" / "demo" / "model.safetensors").stat().st_size < 12e6
    assert demo.preprocessing is not None
    assert demo.preprocessing.size == demo.config.image_size == (64, 64)
    assert demo.config.num_classes == 100
    assert demo.config.class_token
    assert not demo.training


def test_neighbours_have_similar_positions(demo: VisionTransformer, untrained: VisionTransformer) -> None:
    distance, similarity = similarity_by_distance(demo)
    assert similarity[distance == 1].mean() > 0.5
    assert similarity[distance > 4].mean() < 0
    assert np.corrcoef(distance, similarity)[0, 1] < -0.6
    assert abs(np.corrcoef(*similarity_by_distance(untrained))[0, 1]) < 0.1  # so it was learned


def test_the_most_similar_position_is_a_direct_neighbours(demo: VisionTransformer, untrained: VisionTransformer) -> None:
    def share_of_neighbours(model: VisionTransformer) -> float:
        rows, cols = model.config.grid_size(*model.config.image_size)  # type: ignore[misc]
        similarity = position_similarity(model).similarity.reshape(rows * cols, -1) - 2 * np.eye(rows * cols)
        row, col = np.divmod(np.arange(rows * cols), cols)
        other_row, other_col = np.divmod(similarity.argmax(axis=1), cols)
        return float((abs(row - other_row) + abs(col - other_col) == 1).mean())

    assert share_of_neighbours(demo) > 0.9
    assert share_of_neighbours(untrained) < 0.2


def test_attention_distance_varies_over_heads_and_grows_with_depth(
    distances: pd.DataFrame, untrained: VisionTransformer
) -> None:
    uniform = distances.uniform_distance.iloc[0]
    by_layer = distances.groupby("layer").distance
    assert distances.distance.min() < 0.3 * uniform
    assert distances.distance.max() > 0.95 * uniform
    assert (by_layer.max() - by_layer.min()).max() > 0.4 * uniform
    assert by_layer.mean().iloc[:3].mean() < by_layer.mean().iloc[-3:].mean() - 3
    before = mean_attention_distance(untrained, sample_photographs(32)).to_dataframe()
    assert before.distance.min() > 0.7 * uniform  # so it was learned


def test_filters_are_smooth(demo: VisionTransformer, untrained: VisionTransformer) -> None:
    assert smoothness(demo) > 0.5
    assert smoothness(untrained) < 0.35


def test_rollout_differs_from_photograph_to_photograph(demo: VisionTransformer) -> None:
    maps = attention_rollout(demo, sample_photographs(8)).maps.reshape(8, -1)
    shares = maps / maps.sum(axis=1, keepdims=True)
    assert (shares.max(axis=1) * 64 > 1.4).all()  # no map is uniform
    correlations = np.corrcoef(shares)[np.triu_indices(8, 1)]
    assert np.median(correlations) < 0.5


def test_the_card_describes_the_model(demo: VisionTransformer) -> None:
    count = sum(parameter.numel() for parameter in demo.parameters())
    assert f"{count / 1e6:.1f} million parameters" in CARD
    config = demo.config
    assert f"{config.depth} layers, width {config.embed_dim}, {config.num_heads} heads" in CARD


@pytest.mark.skipif(not SHEETS.is_dir(), reason=f"the validation images are not here: {SHEETS} does not exist")
def test_accuracy_is_the_one_on_the_card(demo: VisionTransformer) -> None:
    validation = read_split(SHEETS / "val", 64)
    assert validation.labels.bincount().tolist() == [20] * 100
    top1, top5 = accuracy(demo, validation)
    stated = re.search(r"top-1 \*\*([\d.]+) %\*\*, top-5 \*\*([\d.]+) %\*\*", CARD)
    assert stated is not None
    assert (top1, top5) == pytest.approx((float(stated[1]), float(stated[2])), abs=0.11)
