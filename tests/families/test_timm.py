"""Measuring timm's unmodified models."""

from __future__ import annotations

import pytest
import timm

from tests.families.checks import FamilyChecks, PrecisionChecks
from tests.families.family import Size
from tests.families.timm import FAMILIES, TINY, swin
from vit_probe import InputError, TokenGrid
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


def test_the_error_for_swin_without_fused_attention_names_the_remedy() -> None:
    assert not timm.layers.use_fused_attn(experimental=True)
    model = swin((48, 48)).eval()
    for block in (block for stage in model.layers for block in stage.blocks):
        block.attn.fused_attn = False  # timm's default, without set_fused_attn(True, experimental=True)
    with pytest.raises(InputError, match=r"set_fused_attn\(True, experimental=True\) before the model is built"):
        locate_tokens(model, 48, 48)
