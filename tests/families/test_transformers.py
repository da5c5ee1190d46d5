"""Measuring transformers' unmodified models."""

from __future__ import annotations

import pytest

from tests.example_models import transformers_vit
from tests.families.checks import FamilyChecks, PrecisionChecks
from tests.families.family import Size
from tests.families.transformers import FAMILIES
from vit_probe import TokenGrid
from vit_probe.tokens.locate import locate_tokens


@pytest.mark.parametrize("family", FAMILIES, ids=str)
class TestFamilies(FamilyChecks):
    pass


@pytest.mark.parametrize("family", [FAMILIES[0], *FAMILIES[-2:]], ids=str)
class TestPrecision(PrecisionChecks):
    pass


@pytest.mark.parametrize(("size", "rows", "cols"), [((32, 32), 4, 4), ((64, 24), 8, 3), ((37, 45), 4, 5)])
def test_one_model_at_several_sizes_ignores_incomplete_patches(size: Size, rows: int, cols: int) -> None:
    assert locate_tokens(transformers_vit("Dinov2", image_size=32), *size).grid == TokenGrid(rows, cols, (8, 8), 1, True)


@pytest.mark.parametrize(("size", "rows", "cols"), [((30, 46), 8, 12), ((29, 33), 8, 9)])
def test_swin_pads_images_to_whole_patches(size: Size, rows: int, cols: int) -> None:
    swin = FAMILIES[-1]
    layout = locate_tokens(swin.model((48, 48)), *size)
    assert layout.grid == TokenGrid(rows, cols, (4, 4), 0, False)
    for layer, expected in swin.windows(swin.model((48, 48)), size).items():
        assert layout.windows[layer].patches.equal(expected.patches)
