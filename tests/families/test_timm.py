"""Measuring timm's unmodified models."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from tests.families.checks import FamilyChecks, PrecisionChecks
from tests.families.family import Size
from tests.families.timm import FAMILIES, TINY, swin
from vit_probe import InputError, TokenGrid, attention_rollout, mean_attention_distance
from vit_probe.tokens.locate import locate_tokens


@pytest.mark.parametrize("family", FAMILIES, ids=str)
class TestFamilies(FamilyChecks):
    pass


@pytest.mark.parametrize("family", [FAMILIES[0], *FAMILIES[-2:]], ids=str)
class TestPrecision(PrecisionChecks):
    pass


@pytest.mark.parametrize(("size", "rows", "cols"), [((32, 32), 4, 4), ((64, 24), 8, 3), ((36, 44), 5, 6), ((33, 33), 5, 5)])
def test_one_model_at_several_sizes_padded_to_whole_patches(size: Size, rows: int, cols: int) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, dynamic_img_size=True, dynamic_img_pad=True, **TINY
    ).eval()
    assert locate_tokens(model, *size).grid == TokenGrid(rows, cols, (8, 8), 1, True)


def test_swin_without_fused_attention_is_measured_alike() -> None:
    assert not timm.layers.use_fused_attn(experimental=True)
    torch.manual_seed(0)
    model, images = swin((48, 48)).eval(), torch.randn(2, 3, 48, 48)
    fused = mean_attention_distance(model, images)
    for block in (block for stage in model.layers for block in stage.blocks):
        block.attn.fused_attn = False  # timm's default, without set_fused_attn(True, experimental=True)
    unfused = mean_attention_distance(model, images)
    assert unfused.provenance["unfused"] == unfused.modules
    np.testing.assert_allclose(unfused.distance, fused.distance, rtol=1e-4)


def test_rollout_needs_the_attention_of_all_layers() -> None:
    """ConViT mixes softmax with positions in its first layers, so that only the last two can be measured."""
    model = timm.create_model("convit_tiny", img_size=32, patch_size=8, embed_dim=16, num_heads=2, depth=4, local_up_to_layer=2)
    images = torch.randn(1, 3, 32, 32)
    with pytest.raises(InputError, match=r"rollout multiplies the attention of all layers, but that of blocks\.0\.attn"):
        attention_rollout(model.eval(), images)
