"""Relative positions: the paper's description literally, other grids, masks, and what the hooks see of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import reference
from tests.checkpoints.parity import assert_same, images, randomize
from tests.example_models import Assemble
from vit_probe import (
    InputError,
    TokenGrid,
    VisionTransformer,
    ViTConfig,
    attention_hooks,
    load_model,
    mean_attention_distance,
    save_model,
)
from vit_probe.models.layers import Attention
from vit_probe.models.position_embedding import PatchPositions
from vit_probe.models.relative_position import RelativePosition, resize_relative_position

GRIDS = [
    ((4, 4), (4, 4)),
    ((4, 4), (7, 7)),
    ((3, 5), (6, 10)),
    ((2, 9), (9, 2)),
    ((6, 6), (2, 3)),
    ((1, 7), (1, 4)),
    ((1, 1), (3, 2)),
]


def model(**changes: Any) -> VisionTransformer:
    """Two layers of four heads on 3 x 5 patches of 8 pixels, two prefix tokens."""
    sizes: dict[str, Any] = dict(image_size=(24, 40), patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=7)
    return randomize(VisionTransformer(ViTConfig(**(sizes | dict(position="relative", num_registers=1) | changes))))  # type: ignore[return-value]


def literal_terms(query: np.ndarray, table: np.ndarray, index: list[int], prefix: int) -> np.ndarray:
    """Appendix D.4: for every pair of patches the original query times the embedding of p_q - p_k, scaled as attention is."""
    batch, heads, tokens, dim = query.shape
    zero = len(table) // 2  # the entry of offset 0
    terms = np.zeros((batch, heads, tokens, tokens))
    for b in range(batch):
        for h in range(heads):
            for q, p_q in enumerate(index):
                for k, p_k in enumerate(index):
                    content = query[b, h, prefix + q]
                    terms[b, h, prefix + q, prefix + k] = content @ table[p_q - p_k + zero] / math.sqrt(dim)
    return terms


def literal_attention(layer: Attention, x: Tensor, index: list[int], mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The layer's attention and its values, (batch, head, query, key) and (batch, head, token, dim)."""
    batch, tokens, _ = x.shape
    parts = layer.qkv(x).reshape(batch, tokens, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = layer.q_norm(parts[0]).numpy(), layer.k_norm(parts[1]).numpy(), parts[2].numpy()
    table = layer.rel_pos.table[0].numpy()
    bias = literal_terms(query, table, index, tokens - len(index))
    if mask is not None:
        bias = bias + (np.where(mask, 0.0, -np.inf) if mask.dtype == np.bool_ else mask)
    return reference.softmax_attention(query, key, query.shape[-1] ** -0.5, bias), value


MASKS = {
    "none": None,
    "boolean": np.random.default_rng(0).random((17, 17)) < 0.7,
    "added": np.random.default_rng(0).normal(size=(2, 1, 17, 17)),
    "a head's own": np.random.default_rng(1).random((1, 4, 17, 17)) < 0.7,
}


@torch.no_grad()
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"head_dim": 6}], ids=str)
def test_the_attention_is_the_papers(changes: dict[str, Any], mask: str) -> None:
    layer: Attention = model(**changes).double().blocks[0].attn
    x = torch.randn(2, 17, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    allowed = MASKS[mask]
    if allowed is not None and allowed.dtype == np.bool_:
        allowed = allowed | np.eye(17, dtype=bool)
    attention, value = literal_attention(layer, x, list(range(15)), allowed)
    expected = layer.proj(torch.from_numpy(attention @ value).transpose(1, 2).reshape(2, 17, -1))
    given = None if allowed is None else torch.from_numpy(allowed)
    positions = PatchPositions((3, 5), torch.arange(15))
    torch.testing.assert_close(layer(x, given, positions), expected)
    assert (layer(x, given, positions) - layer.proj(value_mean(value))).abs().max() > 0.1  # not uniform


def value_mean(value: np.ndarray) -> Tensor:
    mean = torch.from_numpy(value.mean(axis=2, keepdims=True)).expand(-1, -1, 17, -1)
    return mean.transpose(1, 2).reshape(2, 17, -1)


@torch.no_grad()
def test_terms_depend_on_the_offset_alone() -> None:
    """With one query everywhere, pairs of the same raster offset have the same term, and prefix tokens have none."""
    terms = RelativePosition((3, 5), head_dim=8)
    query = torch.randn(1, 1, 1, 8).expand(2, 4, 17, 8)
    bias = terms(query, PatchPositions((3, 5), torch.arange(15)))
    assert not bias[:, :, :2].any()
    assert not bias[:, :, :, :2].any()
    by_offset = [bias[0, 0, 2:, 2:].diagonal(-offset) for offset in range(-14, 15)]
    assert all((entries - entries[0]).abs().max() < 1e-7 for entries in by_offset)
    assert len({round(float(entries[0]), 6) for entries in by_offset}) == 29


@torch.no_grad()
def test_each_image_may_have_patches_of_its_own() -> None:
    terms = randomize(RelativePosition((3, 5), head_dim=8))
    query = torch.randn(2, 4, 7, 8, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[3, 0, 14, 7, 8], [1, 2, 13, 4, 5]])
    together = terms(query, PatchPositions((3, 5), index))
    for image in range(2):
        alone = literal_terms(query[image : image + 1].numpy(), terms.table[0].numpy(), index[image].tolist(), 2)
        np.testing.assert_allclose(together[image].numpy(), alone[0], atol=1e-5)


def literal_resize(table: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Pair by pair of the new grid's patches: the old table at their offset in rows and columns, averaged by raster offset."""

    def read(row: float, col: float) -> np.ndarray:
        """Bilinear between the four entries around, offsets beyond the border moved to it."""
        row, col = min(max(row, 1 - old[0]), old[0] - 1), min(max(col, 1 - old[1]), old[1] - 1)
        top, left = math.floor(row), math.floor(col)
        value = np.zeros(table.shape[1])
        for r, c in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            weight = max(1 - abs(row - r), 0) * max(1 - abs(col - c), 0)
            if weight:
                value += weight * table[r * old[1] + c + old[0] * old[1] - 1]
        return value

    patches = [(row, col) for row in range(new[0]) for col in range(new[1])]
    entries: list[list[np.ndarray]] = [[] for _ in range(2 * len(patches) - 1)]
    for q, (q_row, q_col) in enumerate(patches):
        for k, (k_row, k_col) in enumerate(patches):
            offset = (q_row - k_row) * old[0] / new[0], (q_col - k_col) * old[1] / new[1]
            entries[q - k + len(patches) - 1].append(read(*offset))
    return np.stack([np.mean(values, axis=0) for values in entries])


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_resizing_is_the_literal_one(old: tuple[int, int], new: tuple[int, int]) -> None:
    table = torch.randn(1, 2 * old[0] * old[1] - 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    resized = resize_relative_position(table, old, new)
    assert resized.shape == (1, 2 * new[0] * new[1] - 1, 3)
    np.testing.assert_allclose(resized[0].numpy(), literal_resize(table[0].numpy(), old, new), atol=1e-12)


def test_resizing_in_closed_form() -> None:
    table = torch.randn(1, 31, 3)
    assert resize_relative_position(table, (4, 4), (4, 4)) is table
    torch.testing.assert_close(resize_relative_position(torch.ones(1, 31, 3), (4, 4), (7, 3)), torch.ones(1, 41, 3))
    row = torch.randn(1, 9, 1)  # a single row: linear interpolation in one dimension
    expected = np.interp(np.arange(-9, 10) / 2, np.arange(-4, 5), row[0, :, 0].numpy())
    np.testing.assert_allclose(resize_relative_position(row, (1, 5), (1, 10))[0, :, 0].numpy(), expected, atol=1e-6)
    half = resize_relative_position(table.half(), (4, 4), (5, 5))
    assert half.dtype == torch.float16


def test_gradients_pass_through_resizing() -> None:
    table = torch.randn(1, 31, 3).requires_grad_()
    resize_relative_position(table, (4, 4), (6, 6)).sum().backward()
    assert table.grad is not None
    assert table.grad.sum() == pytest.approx(71 * 3, rel=1e-5)


@torch.no_grad()
def test_other_image_sizes() -> None:
    """Resized once or in the forward pass, it is the same; and the layers' tables are those of the new grid."""
    vit = model()
    native, larger = images(24, 40), images(48, 32)
    before = vit(larger)
    tables = [block.attn.rel_pos.table for block in vit.blocks]
    assert vit.resize((48, 32)) is vit
    torch.testing.assert_close(vit(larger), before)
    for block, table in zip(vit.blocks, tables, strict=True):
        assert torch.equal(block.attn.rel_pos.table, resize_relative_position(table, (3, 5), (6, 4)))
        assert block.attn.rel_pos.table.requires_grad
        assert block.attn.rel_pos.grid == (6, 4)
    assert vit(native).shape == (2, 7)


@torch.no_grad()
def test_a_blocked_key_cannot_matter() -> None:
    vit = model()
    batch, changed = images(24, 40), images(24, 40)
    changed[:, :, -8:, -8:] += 1
    mask = torch.ones(17, 17, dtype=torch.bool)
    mask[:-1, -1] = False
    assert torch.equal(vit(batch, mask=mask), vit(changed, mask=mask))
    assert (vit(batch) - vit(changed)).abs().max() > 1e-3
    assert_same(vit(batch, mask=torch.zeros(17, 17).masked_fill(~mask, -torch.inf)), vit(batch, mask=mask))
    assert_same(vit(batch, mask=torch.ones(17, 17, dtype=torch.bool)), vit(batch))


@torch.no_grad()
def test_hooks_see_the_attention() -> None:
    vit, batch = model(depth=1).double(), images(24, 40).double()
    with attention_hooks(vit, seen := Assemble(), verify=True):
        vit(batch)
    block = vit.blocks[0]
    expected, _ = literal_attention(block.attn, block.norm1(vit._embed(batch)), list(range(15)), None)
    np.testing.assert_allclose(seen.attention()[0], expected, atol=1e-6)
    distance = reference.mean_attention_distance(expected[None], 3, 5, (8, 8), 2, "renormalize").mean
    result = mean_attention_distance(vit, batch, device="cpu")
    np.testing.assert_allclose(result.distance, distance, rtol=1e-5)
    assert vit.token_grid(24, 40) == TokenGrid(3, 5, (8, 8), 2, True)


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path) -> None:
    vit, batch = model(head_dim=6), images(24, 40)
    again = load_model(save_model(vit, tmp_path / "relative.safetensors"))
    assert again.config == vit.config
    torch.testing.assert_close(again(batch), vit(batch), rtol=0, atol=0)
    resized = load_model(save_model(vit.resize(48), tmp_path / "resized.safetensors"))
    torch.testing.assert_close(resized(batch), vit(batch), rtol=0, atol=0)


def test_there_is_no_table_of_absolute_positions_and_all_tables_learn() -> None:
    vit = model(pooling="avg").train()
    assert vit.pos_embed is None
    assert vit.position_table() is None
    vit(images(24, 40)).sum().backward()
    assert all(block.attn.rel_pos.table.grad.abs().max() > 0 for block in vit.blocks)
    vit = model(pooling="token").train()  # the class token, which has no terms, asks alone in the last layer
    vit(images(24, 40)).sum().backward()
    assert [bool(block.attn.rel_pos.table.grad.any()) for block in vit.blocks] == [True, False]


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(InputError, match=r"offsets in 4 x 4 patches has shape \(1, 31, dim\), got \(1, 32, 3\)"):
        resize_relative_position(torch.rand(1, 32, 3), (4, 4), (5, 5))
    with pytest.raises(InputError, match=r"got \(31, 3\)"):
        resize_relative_position(torch.rand(31, 3), (4, 4), (5, 5))
    with pytest.raises(InputError, match=r"at least one row and one column, got \(0, 5\)"):
        resize_relative_position(torch.rand(1, 31, 3), (4, 4), (0, 5))
    with pytest.raises(
        InputError, match="attention with relative positions needs to know where the patches lie; call the model"
    ):
        model().blocks[0](torch.rand(1, 17, 32))
