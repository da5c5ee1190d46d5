"""Rotary positions in two dimensions: the rotation literally, what depends on the offset alone, and what the hooks see."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import reference
from tests.checkpoints.parity import images, randomize
from tests.example_models import Assemble
from vit_probe import InputError, VisionTransformer, ViTConfig, attention_hooks, load_model, mean_attention_distance, save_model
from vit_probe.models.position_embedding import PatchPositions
from vit_probe.models.rotary_position import rotate_by_position


def model(**changes: Any) -> VisionTransformer:
    """Two layers of four heads on 3 x 5 patches of 8 pixels, two prefix tokens."""
    sizes: dict[str, Any] = dict(image_size=(24, 40), patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=7)
    return randomize(VisionTransformer(ViTConfig(**(sizes | dict(position="rope_2d", num_registers=1) | changes))))  # type: ignore[return-value]


def literal_rotation(x: np.ndarray, index: list[int], cols: int, prefix: int) -> np.ndarray:
    """Each pair of channels as a complex number, times exp(i * angle); the first half by column, the second by row."""
    rotated = np.array(x, dtype=np.float64)
    quarter = x.shape[-1] // 4
    for token, patch in enumerate(index):
        for half, coordinate in enumerate((patch % cols, patch // cols)):
            for t in range(quarter):
                angle = coordinate * 100 ** (-t / quarter)
                channel = 2 * (half * quarter + t)
                for place in np.ndindex(x.shape[:2]):
                    entry = *place, prefix + token
                    turned = complex(*x[entry][channel : channel + 2]) * complex(math.cos(angle), math.sin(angle))
                    rotated[entry][channel : channel + 2] = turned.real, turned.imag
    return rotated


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("dim", [4, 8, 16])
def test_the_rotation_is_the_literal_one(dim: int, prefix: int) -> None:
    x = torch.randn(2, 3, prefix + 15, dim, dtype=torch.float64)
    ours = rotate_by_position(x, PatchPositions((3, 5), torch.arange(15)))
    np.testing.assert_allclose(ours.numpy(), literal_rotation(x.numpy(), list(range(15)), 5, prefix), atol=1e-12)
    index = torch.tensor([[3, 0, 14], [7, 8, 2]])  # each image patches of its own
    some = rotate_by_position(x[:, :, : prefix + 3], PatchPositions((3, 5), index))
    for image in range(2):
        alone = literal_rotation(x[image : image + 1, :, : prefix + 3].numpy(), index[image].tolist(), 5, prefix)
        np.testing.assert_allclose(some[image].numpy(), alone[0], atol=1e-12)
    assert rotate_by_position(x.half(), PatchPositions((3, 5), torch.arange(15))).dtype == torch.float16


def test_scores_depend_on_the_offset_alone() -> None:
    """With one query and one key everywhere, every pair of patches at an offset in rows and columns has the same score."""
    query, key = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).expand(-1, 1, 1, 30, 16)
    positions = PatchPositions((5, 6), torch.arange(30))
    scores = rotate_by_position(query, positions)[0, 0] @ rotate_by_position(key, positions)[0, 0].mT
    by_offset: dict[tuple[int, int], list[float]] = {}
    for q in range(30):
        for k in range(30):
            by_offset.setdefault((q // 6 - k // 6, q % 6 - k % 6), []).append(float(scores[q, k]))
    assert len(by_offset) == 9 * 11
    assert max(max(values) - min(values) for values in by_offset.values()) < 1e-12
    assert len({round(values[0], 9) for values in by_offset.values()}) == 9 * 11
    assert by_offset[0, 0][0] == pytest.approx(float(query[0, 0, 0] @ key[0, 0, 0]))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"head_dim": 12}], ids=str)
def test_hooks_see_the_literal_attention(changes: dict[str, Any]) -> None:
    """Queries and keys are rotated after their norm, values not at all."""
    vit, batch = model(depth=1, **changes).double(), images(24, 40).double()
    with attention_hooks(vit, seen := Assemble(), verify=True):
        vit(batch)
    block = vit.blocks[0]
    layer, x = block.attn, block.norm1(vit._embed(batch))
    query, key, value = layer.qkv(x).reshape(2, 17, 3, 4, -1).permute(2, 0, 3, 1, 4)
    turned = [literal_rotation(part.numpy(), list(range(15)), 5, 2) for part in (layer.q_norm(query), layer.k_norm(key))]
    expected = reference.softmax_attention(*turned, query.shape[-1] ** -0.5)
    np.testing.assert_allclose(seen.attention()[0], expected, atol=1e-6)
    out = layer.proj((torch.from_numpy(expected) @ value).transpose(1, 2).reshape(2, 17, -1))
    torch.testing.assert_close(layer(x, None, PatchPositions((3, 5), torch.arange(15))), out)
    distance = reference.mean_attention_distance(expected[None], 3, 5, (8, 8), 2, "renormalize").mean
    np.testing.assert_allclose(mean_attention_distance(vit, batch, device="cpu").distance, distance, rtol=1e-5)


@torch.no_grad()
def test_other_image_sizes_and_masks() -> None:
    """There is nothing to resize, and a key that is hidden from all others changes nothing else."""
    vit, larger = model(), images(48, 32)
    before, state = vit(larger), {name: value.clone() for name, value in vit.state_dict().items()}
    torch.testing.assert_close(vit.resize((48, 32))(larger), before)
    assert all(torch.equal(value, state[name]) for name, value in vit.state_dict().items())
    changed = larger.clone()
    changed[:, :, -8:, -8:] += 1
    mask = torch.ones(26, 26, dtype=torch.bool)
    mask[:-1, -1] = False
    assert torch.equal(vit(larger, mask=mask), vit(changed, mask=mask))
    assert (vit(larger) - vit(changed)).abs().max() > 1e-3


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path) -> None:
    vit, batch = model(head_dim=12), images(24, 40)
    assert (vit.pos_embed, vit.position_table()) == (None, None)
    again = load_model(save_model(vit, tmp_path / "rope.safetensors"))
    assert again.config == vit.config
    torch.testing.assert_close(again(batch), vit(batch), rtol=0, atol=0)


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(
        InputError, match=r"'rope_2d' needs a head_dim divisible by 4, got 6; change embed_dim or num_heads, or"
    ):
        ViTConfig(embed_dim=24, num_heads=4, position="rope_2d")
    with pytest.raises(InputError, match="needs a head_dim divisible by 4, got 10"):
        ViTConfig(embed_dim=24, num_heads=4, head_dim=10, position="rope_2d")
    with pytest.raises(
        InputError, match="attention with rope_2d positions needs to know where the patches lie; call the model"
    ):
        model().blocks[0](torch.rand(1, 17, 32))
