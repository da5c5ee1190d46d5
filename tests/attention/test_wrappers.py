"""Models inside wrappers are measured as they are, and quantised layers can compute without rounding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.optim.swa_utils import AveragedModel

from tests.example_models import FAMILIES, small_vit
from vit_probe import attention_rollout, load_model, mean_attention_distance, patch_filters, position_similarity
from vit_probe.attention.wrappers import full_precision, unwrap
from vit_probe.measures.deletion import deletion
from vit_probe.models.reinitialize import random_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled DataParallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize(("name", "family"), list(zip(WRAPPERS, ["ours", "timm", "transformers-vit", "ours"], strict=True)))
def test_wrapped_models_are_measured_as_the_model_inside(name: str, family: str) -> None:
    model, x = FAMILIES[family].model(), FAMILIES[family].images()
    wrapped = WRAPPERS[name](model)
    for measured in (
        lambda one: mean_attention_distance(one, x),
        lambda one: patch_filters(one, components=3),
        position_similarity,
    ):
        expected, result = measured(model), measured(wrapped)
        assert result.provenance["model"] == expected.provenance["model"]
        assert result.provenance["layers" if "layers" in result.provenance else "grid"]
        for column in expected.to_dataframe():
            np.testing.assert_array_equal(result.to_dataframe()[column], expected.to_dataframe()[column])
    torch.compiler.reset()


def test_attributes_of_wrapped_models_are_used() -> None:
    model, x = load_model("demo"), torch.rand(2, 3, 64, 64)
    wrapped = nn.DataParallel(model)
    maps = {"rollout": attention_rollout(wrapped, x).maps}
    np.testing.assert_array_equal(
        deletion(wrapped, x, maps, steps=2).probability, deletion(model, x, maps, steps=2).probability
    )
    assert random_weights(wrapped).name == random_weights(model).name


def test_a_wrapper_of_the_users_own_is_not_unwrapped() -> None:
    class Normalized(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(2 * x - 1)

    model = Normalized(small_vit())
    assert unwrap(nn.DataParallel(model)) is model


def test_quantised_layers_compute_without_rounding_inside_the_context() -> None:
    torch.manual_seed(0)
    model = quantize_dynamic(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2, bias=False)), {nn.Linear})
    x = torch.randn(5, 8)
    rounded = model(x)
    weight, bias = model[0].weight().dequantize(), model[0].bias()
    expected = (x @ weight.T + bias) @ model[1].weight().dequantize().T
    with full_precision(model):
        torch.testing.assert_close(model(x), expected)
    assert torch.equal(model(x), rounded)
    assert not torch.equal(rounded, expected)


@pytest.mark.parametrize("name", ["ours", "timm-registers"])
def test_quantised_models_are_measured(name: str) -> None:
    family = FAMILIES[name]
    model, x = family.model(), family.images()
    expected = mean_attention_distance(model, x).to_dataframe().distance
    result = mean_attention_distance(quantize_dynamic(model, {nn.Linear}), x)
    assert result.provenance["grid"]["num_prefix_tokens"] == family.grid.num_prefix_tokens
    np.testing.assert_allclose(result.to_dataframe().distance, expected, rtol=0.02)
    assert (result.to_dataframe().distance != expected).any()


def test_the_precision_of_gpus_is_restored() -> None:
    def allows_tf32() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = allows_tf32()
    model = nn.Linear(2, 2)
    with full_precision(model):
        assert not torch.backends.cuda.matmul.allow_tf32
        if hasattr(torch.backends.cudnn, "conv"):
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert allows_tf32() == before
