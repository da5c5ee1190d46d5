"""TokenGrid and find_token_grid: where the patches of every family of models lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import ViTMAEConfig, ViTMAEModel

from tests import reference
from tests.models import FAMILIES, Encoder, images, small_vit, transformers_vit
from vit_probe import InputError, TokenGrid, attention_hooks
from vit_probe.config import ResNetConfig
from vit_probe.geometry import find_token_grid

grids = st.builds(
    TokenGrid,
    rows=st.integers(1, 6),
    cols=st.integers(1, 6),
    patch_size=st.tuples(st.integers(1, 32), st.integers(1, 32)),
    num_prefix_tokens=st.integers(1, 5),
    has_cls_token=st.booleans(),
)


@given(grids)
def test_centres_are_the_references(grid: TokenGrid) -> None:
    assert grid.centres().dtype == torch.float64
    np.testing.assert_array_equal(grid.centres(), reference.patch_centres(grid.rows, grid.cols, *grid.patch_size))


@given(grids, st.data())
def test_distances_are_those_between_centres(grid: TokenGrid, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, grid.num_patches))
    stop = data.draw(st.none() | st.integers(start, grid.num_patches))
    centres = reference.patch_centres(grid.rows, grid.cols, *grid.patch_size)
    expected = np.linalg.norm(centres[start:stop, None] - centres, axis=-1)
    distances = grid.distances(start, stop)
    assert distances.shape == expected.shape
    np.testing.assert_allclose(distances, expected, rtol=1e-6)


def test_distances_are_the_callers_own() -> None:
    grid = TokenGrid(2, 3, (8, 4), 1, True)
    grid.distances().fill_(7)
    assert grid.distances()[0].tolist() == [0, 4, 8, 8, pytest.approx(80**0.5), pytest.approx(128**0.5)]


@given(grids)
def test_uniform_distance_is_the_mean_over_all_pairs(grid: TokenGrid) -> None:
    expected = reference.uniform_distance(grid.rows, grid.cols, grid.patch_size)
    assert grid.uniform_distance() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("side", "patch", "pixels"), [(14, 16, 116.49), (7, 32, 115.50), (16, 14, 116.57), (37, 14, 269.99)])
def test_uniform_distance_of_the_usual_grids(side: int, patch: int, pixels: float) -> None:
    assert TokenGrid(side, side, (patch, patch), 1, True).uniform_distance() == pytest.approx(pixels, abs=0.005)


def test_counts() -> None:
    grid = TokenGrid(2, 3, (8, 4), 5, True)
    assert (grid.num_patches, grid.num_tokens) == (6, 11)
    grid.check_tokens(11)


@pytest.mark.parametrize(
    ("options", "prefix", "has_cls"),
    [
        ({}, 1, True),
        ({"num_registers": 3}, 4, True),
        ({"distillation_token": True, "pooling": "distilled"}, 2, True),
        ({"class_token": False, "pooling": "avg"}, 0, False),
        ({"class_token": False, "pooling": "avg", "num_registers": 2}, 2, False),
    ],
)
def test_grid_of_our_own_model(options: dict, prefix: int, has_cls: bool) -> None:
    model = small_vit(**options)
    assert find_token_grid(model, 24, 24) == TokenGrid(3, 4, (8, 6), prefix, has_cls)
    assert find_token_grid(model, 40, 12) == TokenGrid(5, 2, (8, 6), prefix, has_cls)


def test_grid_of_our_own_hybrid_counts_the_stems_stride() -> None:
    model = small_vit(image_size=(32, 64), patch_size=(2, 1), stem=ResNetConfig(layers=(1, 1), width=32))
    assert find_token_grid(model, 32, 64) == TokenGrid(2, 8, (16, 8), 1, True)
    with attention_hooks(model, Checks(find_token_grid(model, 32, 64))):
        model(images(32, 64, batch=1))


class Checks:
    """An observer that only counts tokens."""

    def __init__(self, grid: TokenGrid) -> None:
        self.grid = grid

    def update(self, tile) -> None:
        self.grid.check_tokens(tile.num_tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_grid_of_every_family(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    grid = find_token_grid(model, *family.size)
    assert grid == family.grid
    with attention_hooks(model, Checks(grid)):
        model(family.images(1))


def _timm(name: str, **options) -> nn.Module:
    import timm

    return timm.create_model(name, embed_dim=24, depth=1, num_heads=2, **options)


@pytest.mark.parametrize(
    ("build", "size", "grid"),
    [
        (lambda: _timm("deit_tiny_distilled_patch16_224", img_size=(32, 48)), (32, 48), TokenGrid(2, 3, (16, 16), 2, True)),
        (
            lambda: _timm("vit_tiny_patch16_224", img_size=(32, 48), patch_size=(16, 8)),
            (32, 48),
            TokenGrid(2, 6, (16, 8), 1, True),
        ),
        (lambda: _timm("vit_tiny_r_s16_p8_224", img_size=(64, 96)), (64, 96), TokenGrid(2, 3, (32, 32), 1, True)),
        (
            lambda: _timm("vit_tiny_patch16_224", img_size=32, dynamic_img_size=True),
            (64, 32),
            TokenGrid(4, 2, (16, 16), 1, True),
        ),
        (lambda: transformers_vit("DeiT"), (32, 48), TokenGrid(4, 6, (8, 8), 2, True)),
        (lambda: transformers_vit("DINOv3ViT", num_register_tokens=2), (32, 48), TokenGrid(4, 6, (8, 8), 3, True)),
        (lambda: transformers_vit("CLIPVision", image_size=32), (32, 32), TokenGrid(4, 4, (8, 8), 1, True)),
        (lambda: transformers_vit("Beit", image_size=32), (32, 32), TokenGrid(4, 4, (8, 8), 1, True)),
        (lambda: transformers_vit("IJepa"), (32, 48), TokenGrid(4, 6, (8, 8), 0, False)),
    ],
)
def test_grid_of_other_models(build, size: tuple[int, int], grid: TokenGrid) -> None:
    model = build().eval()
    assert find_token_grid(model, *size) == grid
    with attention_hooks(model, Checks(grid)):
        model(images(*size, batch=1))


def test_grid_from_the_first_convolution_whose_stride_is_its_kernel() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, (4, 6), (4, 6)), nn.Conv2d(8, 8, 2, 2)
    )
    assert find_token_grid(model, 16, 18) == TokenGrid(4, 3, (4, 6), 0, False)
    assert find_token_grid(Encoder(), 32, 48).patch_size == (8, 8)


# Errors


def test_a_model_without_patches_cannot_be_read() -> None:
    with pytest.raises(InputError, match=r"cannot tell the patch size of Linear.*pass grid=TokenGrid"):
        find_token_grid(nn.Linear(2, 2), 16, 16)


def test_an_image_that_does_not_divide() -> None:
    with pytest.raises(InputError, match="25 x 24 pixels does not divide into patches of 8 x 6"):
        find_token_grid(small_vit(), 25, 24)
    with pytest.raises(InputError, match="needs positive rows"):
        find_token_grid(FAMILIES["timm"].model(), 4, 48)


def test_tokens_that_do_not_fit() -> None:
    with pytest.raises(InputError, match=r"covers 12 tokens, but TokenGrid\(rows=2, cols=3.*accounts for 11; pass the grid"):
        TokenGrid(2, 3, (8, 4), 5, True).check_tokens(12)


@pytest.mark.parametrize("values", [(0, 3, (8, 8), 0), (3, 0, (8, 8), 0), (3, 3, (8, 0), 0), (3, 3, (8, 8), -1)])
def test_impossible_grids(values: tuple) -> None:
    with pytest.raises(InputError, match="needs positive rows, columns and patch sizes and no negative prefix"):
        TokenGrid(*values, has_cls_token=False)


def test_a_class_token_is_a_prefix_token() -> None:
    with pytest.raises(InputError, match="a class token is a prefix token"):
        TokenGrid(3, 3, (8, 8), 0, True)


def test_a_model_that_shuffles_its_patches() -> None:
    config = ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(InputError, match="ViTMAEModel drops and shuffles patches at random"):
        find_token_grid(ViTMAEModel(config), 32, 32)
