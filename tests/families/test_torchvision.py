"""torchvision's models, untouched."""

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


def test_the_fast_path_calls_no_fused_attention_and_is_seen_all_the_same() -> None:
    check_fast_path(FAMILIES[0])
