"""Measuring unmodified models made of torch's own modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.families.checks import FamilyChecks, PrecisionChecks, check_fast_path, hooked
from tests.families.torch import FAMILIES

BY_NAME = {family.name: family for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES, ids=str)
class TestFamilies(FamilyChecks):
    pass


@pytest.mark.parametrize("family", [FAMILIES[0], *FAMILIES[-2:]], ids=str)
class TestPrecision(PrecisionChecks):
    pass


@pytest.mark.parametrize("name", ["nn.TransformerEncoder", "nn.TransformerEncoder, norm_first"])
def test_attention_of_the_fast_path_is_recorded_without_fused_attention(name: str) -> None:
    check_fast_path(BY_NAME[name])


@pytest.mark.parametrize("name", ["nn.MultiheadAttention with weights", "nn.MultiheadAttention with mean weights"])
def test_weights_that_the_model_requests_are_returned_unchanged(name: str) -> None:
    model, images = BY_NAME[name].model(), BY_NAME[name].images()
    returned: list[Tensor] = []
    for attention in model.attention:
        attention.register_forward_hook(lambda module, args, result: returned.append(result[1]))
    with torch.no_grad():
        model(images)
        _, recorded, *_ = hooked(model, images)
    assert len(returned) == 4
    for layer, (without_hooks, with_hooks) in enumerate(zip(returned[:2], returned[2:], strict=True)):
        assert with_hooks.equal(without_hooks)
        attention = torch.from_numpy(recorded.layers[layer])
        assert (with_hooks - (attention if with_hooks.ndim == 4 else attention.mean(1))).abs().max() < 1e-6
