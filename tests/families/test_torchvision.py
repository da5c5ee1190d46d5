"""torchvision's models, untouched."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from tests.families.checks import FamilyChecks, PrecisionChecks, hooked
from tests.families.torchvision import FAMILIES


@pytest.mark.parametrize("family", FAMILIES, ids=str)
class TestFamilies(FamilyChecks):
    pass


@pytest.mark.parametrize("family", FAMILIES, ids=str)
class TestPrecision(PrecisionChecks):
    pass


def test_the_fast_path_calls_no_fused_attention_and_is_seen_all_the_same() -> None:
    model, images = FAMILIES[0].model(), FAMILIES[0].images()
    with torch.no_grad():
        with mock.patch.object(F, "scaled_dot_product_attention", side_effect=AssertionError):
            untouched = model(images)
        result, seen, *_ = hooked(model, images)
    assert sorted(seen.layers) == [0, 1]
    assert (result - untouched).abs().max() < 1e-5
