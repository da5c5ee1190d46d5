"""Models made of torch's own modules, untouched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.families.checks import FamilyChecks, PrecisionChecks, check_fast_path, hooked
from tests.families.torch import FAMILIES

NAMED = {family.name: family for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES, ids=str)
class TestFamilies(FamilyChecks):
    pass


@pytest.mark.parametrize("family", [FAMILIES[0], *FAMILIES[-2:]], ids=str)
class TestPrecision(PrecisionChecks):
    pass


@pytest.mark.parametrize("name", ["nn.TransformerEncoder", "nn.TransformerEncoder, norm_first"])
def test_the_fast_path_calls_no_fused_attention_and_is_seen_all_the_same(name: str) -> None:
    check_fast_path(NAMED[name])


@pytest.mark.parametrize("name", ["nn.MultiheadAttention with weights", "nn.MultiheadAttention with mean weights"])
def test_weights_that_the_model_asks_for_are_handed_to_it_unchanged(name: str) -> None:
    model, images = NAMED[name].model(), NAMED[name].images()
    handed: list[Tensor] = []
    for attention in model.attention:
        attention.register_forward_hook(lambda module, args, result: handed.append(result[1]))
    with torch.no_grad():
        model(images)
        _, seen, *_ = hooked(model, images)
    assert len(handed) == 4
    for layer, (untouched, given) in enumerate(zip(handed[:2], handed[2:], strict=True)):
        assert given.equal(untouched)
        attention = torch.from_numpy(seen.layers[layer])
        assert (given - (attention if given.ndim == 4 else attention.mean(1))).abs().max() < 1e-6
