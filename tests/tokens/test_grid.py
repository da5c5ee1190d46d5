"""TokenGrid, OffsetTable and Windows: where patches lie, and functions of their offsets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from vit_probe import InputError, TokenGrid
from vit_probe.tokens.grid import OffsetTable, Windows

grids = st.builds(
    TokenGrid,
    rows=st.integers(1, 6),
    cols=st.integers(1, 6),
    patch_size=st.tuples(st.integers(1, 32), st.integers(1, 32)),
    num_prefix_tokens=st.integers(1, 5),
    has_cls_token=st.booleans(),
)


def distances_of(grid: TokenGrid) -> OffsetTable:
    return OffsetTable(grid, torch.hypot)


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
    distances = distances_of(grid).rows(start, stop)
    assert distances.shape == expected.shape
    np.testing.assert_allclose(distances, expected, rtol=1e-6)


def signed(dx: Tensor, dy: Tensor) -> Tensor:
    """A function that tells right from left, and x from y."""
    return dx + 1000 * dy


@given(grids, st.booleans())
def test_offsets_run_from_query_to_key(grid: TokenGrid, in_patches: bool) -> None:
    """Right and down are positive, in pixels or patches, in each way of reading the table."""
    table = OffsetTable(grid, signed, in_patches=in_patches)
    height, width = (1, 1) if in_patches else grid.patch_size
    expected = np.zeros((grid.num_patches, grid.num_patches))
    for query in range(grid.num_patches):
        for key in range(grid.num_patches):
            dy, dx = key // grid.cols - query // grid.cols, key % grid.cols - query % grid.cols
            expected[query, key] = dx * width + 1000 * dy * height
    np.testing.assert_allclose(table.rows(), expected, rtol=1e-6)
    patches = torch.arange(grid.num_patches)
    np.testing.assert_array_equal(table.pairs(patches.flip(0), patches), expected[::-1])
    assert table.uniform() == pytest.approx(expected.mean(), abs=1e-6)


def test_offsets_of_a_small_grid() -> None:
    dx, dy = TokenGrid(2, 3, (8, 4), 1, True).offsets()
    assert dx.tolist() == [[-8, -4, 0, 4, 8]] * 3
    assert dy.tolist() == [[-8] * 5, [0] * 5, [8] * 5]
    assert dx.dtype == dy.dtype == torch.float64


def test_rows_are_the_callers_own() -> None:
    table = distances_of(TokenGrid(2, 3, (8, 4), 1, True))
    table.rows().fill_(7)
    assert table.rows()[0].tolist() == [0, 4, 8, 8, pytest.approx(80**0.5), pytest.approx(128**0.5)]


def test_a_constant_may_be_a_single_number() -> None:
    table = OffsetTable(TokenGrid(2, 3, (8, 4), 1, True), lambda dx, dy: torch.tensor(3))
    assert table.rows().tolist() == [[3.0] * 6] * 6
    assert table.uniform() == 3


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda dx, dy: dx[0], r"tensor of shape \(3, 5\); got a tensor of shape \(5,\)"),
        (lambda dx, dy: dx.sum(dim=0, keepdim=True), r"tensor of shape \(3, 5\); got a tensor of shape \(1, 5\)"),
        (lambda dx, dy: torch.stack([dx, dy]), r"got a tensor of shape \(2, 3, 5\)"),
        (lambda dx, dy: dx / dx, r"got a tensor of shape \(3, 5\) with numbers that are not finite"),
        (lambda dx, dy: torch.tensor(torch.inf), r"got a tensor of shape \(\)"),
        (lambda dx, dy: 1.0, "got a float"),
        (lambda dx, dy: None, "got a NoneType"),
        (lambda dx, dy: dx.numpy(), "got a ndarray"),
    ],
)
def test_functions_that_do_not_return_one_number_per_offset(function: Any, got: str) -> None:
    with pytest.raises(InputError, match=f"must return one finite number per offset, a .*{got}"):
        OffsetTable(TokenGrid(2, 3, (8, 4), 1, True), function)


@pytest.mark.parametrize(("start", "stop"), [(0, 15), (1, 2), (4, 6), (3, 12), (4, 13), (14, 15), (5, 5), (-4, -1)])
@pytest.mark.parametrize(("rows", "cols"), [(3, 5), (5, 3), (1, 15), (15, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_written_to_memory(rows: int, cols: int, start: int, stop: int, dtype: torch.dtype) -> None:
    grid = TokenGrid(rows, cols, (8, 6), 2, True)
    memory = torch.full((17, 15), torch.nan, dtype=dtype)
    length = len(range(15)[start:stop])
    out = memory[1 : 1 + length]
    assert distances_of(grid).rows(start, stop, out=out) is out
    centres = reference.patch_centres(rows, cols, 8, 6)
    np.testing.assert_allclose(out, np.linalg.norm(centres[start:stop, None] - centres, axis=-1), rtol=1e-6)
    assert memory[0].isnan().all()
    assert memory[1 + length :].isnan().all()


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


# Windows

WINDOWS = Windows(TokenGrid(2, 3, (8, 4), 0, False), torch.tensor([[0, 1, 3, 4], [2, -1, 5, -1]]))


def test_distances_within_windows() -> None:
    far = (64 + 16) ** 0.5
    expected = [
        [[0, 4, 8, far], [4, 0, far, 8], [8, far, 0, 4], [far, 8, 4, 0]],
        [[0, 0, 8, 0], [0, 0, 0, 0], [8, 0, 0, 0], [0, 0, 0, 0]],
    ]
    table = distances_of(WINDOWS.grid)
    distances = WINDOWS.pairs(table)
    is_patch = WINDOWS.is_patch
    assert is_patch.tolist() == [[True] * 4, [True, False, True, False]]
    np.testing.assert_allclose(distances * is_patch[:, :, None], expected)
    some = WINDOWS.pairs(table, torch.tensor([1, 0, 1]), slice(1, 3))
    np.testing.assert_array_equal(some, distances[[1, 0, 1], 1:3])


def test_uniform_attention_within_windows() -> None:
    far = (64 + 16) ** 0.5
    table = distances_of(WINDOWS.grid)
    assert WINDOWS.uniform(table) == pytest.approx((4 * (4 + 8 + far) / 4 + 2 * 8 / 2) / 6)
    masked = torch.zeros(2, 4, 4, dtype=torch.bool)
    masked[0, :2, 2:] = masked[0, 2:, :2] = True  # upper and lower row are hidden from each other
    assert replace(WINDOWS, masked_pairs=masked).uniform(table) == pytest.approx((4 * 4 / 2 + 2 * 8 / 2) / 6)


def test_one_window_over_all_is_the_grid() -> None:
    grid = TokenGrid(3, 4, (8, 6), 0, False)
    windows = Windows(grid, torch.arange(12)[None])
    table = distances_of(grid)
    assert windows.uniform(table) == pytest.approx(grid.uniform_distance())
    np.testing.assert_allclose(windows.pairs(table)[0], table.rows(), rtol=1e-6)
    np.testing.assert_array_equal(windows.pairs(table, slice(None), slice(3, 7))[0], table.rows(3, 7))


# What a model says of its patches


# Errors


def test_tokens_that_do_not_fit() -> None:
    with pytest.raises(InputError, match=r"covers 12 tokens, but TokenGrid\(rows=2, cols=3.*accounts for 11; pass the grid"):
        TokenGrid(2, 3, (8, 4), 5, True).check_tokens(12)


@pytest.mark.parametrize("values", [(0, 3, (8, 8), 0), (3, 0, (8, 8), 0), (3, 3, (8, 0), 0)])
def test_impossible_grids(values: tuple) -> None:
    with pytest.raises(InputError, match="needs positive rows, columns and patch sizes"):
        TokenGrid(*values, has_cls_token=False)


@pytest.mark.parametrize("numbers", [dict(num_prefix_tokens=-1), dict(num_prefix_tokens=0, num_suffix_tokens=-1)])
def test_negative_numbers_of_tokens(numbers: dict[str, int]) -> None:
    with pytest.raises(InputError, match="no negative number of prefix or suffix tokens"):
        TokenGrid(3, 3, (8, 8), has_cls_token=False, **numbers)


def test_tokens_around_the_patches() -> None:
    grid = TokenGrid(2, 3, (8, 4), 2, True, num_suffix_tokens=4)
    assert (grid.num_tokens, grid.patch_tokens, grid.class_token) == (12, slice(2, 8), 0)
    assert TokenGrid(2, 3, (8, 4), 2, False, class_token=1) == TokenGrid(2, 3, (8, 4), 2, True, class_token=1)
    assert TokenGrid(2, 3, (8, 4), 0, True, class_token=6, num_suffix_tokens=1).find_class_token() == 6
    assert TokenGrid(2, 3, (8, 4), 2, False).find_class_token() is None


@pytest.mark.parametrize("class_token", [2, 7])
def test_a_class_token_is_no_patch(class_token: int) -> None:
    with pytest.raises(InputError, match=r"a class token is a prefix or suffix token, but TokenGrid.* has a patch in its"):
        TokenGrid(2, 3, (8, 8), 2, True, class_token=class_token)
    with pytest.raises(InputError, match="has a patch in its place"):
        TokenGrid(3, 3, (8, 8), 0, True)


@pytest.mark.parametrize("class_token", [-1, 8])
def test_a_class_token_is_one_of_the_tokens(class_token: int) -> None:
    with pytest.raises(InputError, match="the class token must be one of 8 tokens"):
        TokenGrid(2, 3, (8, 8), 2, True, class_token=class_token)


def test_an_unknown_class_token() -> None:
    with pytest.raises(
        InputError, match=r"which of the 3 tokens that are not patches is the class token .* pass grid=TokenGrid"
    ):
        TokenGrid(2, 3, (8, 8), 2, None, num_suffix_tokens=1).find_class_token()
