"""Measuring torchvision's unmodified models."""

from __future__ import annotations

import pytest

from tests.families.checks import FamilyChecks, PrecisionChecks, check_fast_path
from tests.families.torchvision import FAMILIES


@pytest.mark.parametrize("family", FAMILIES, ids=str)
class TestFamilies(FamilyChecks):
    pass


@pytest.mark.parametrize("family", FAMILIES, ids=str)
class TestPrecision(PrecisionChecks):
    pass


def test_attention_of_the_fast_path_is_recorded_without_fused_attention() -> None:
    check_fast_path(FAMILIES[0])
