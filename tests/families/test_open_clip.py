"""Measuring open_clip's unmodified image towers."""

from __future__ import annotations

import pytest

from tests.families.checks import FamilyChecks, PrecisionChecks
from tests.families.open_clip import FAMILIES


@pytest.mark.parametrize("family", FAMILIES, ids=str)
class TestFamilies(FamilyChecks):
    pass


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[-1]], ids=str)
class TestPrecision(PrecisionChecks):
    pass
