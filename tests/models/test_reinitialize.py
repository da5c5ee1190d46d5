"""Weights drawn anew: nothing of the old ones is left, and the model still runs."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.example_models import FAMILIES, images, output, small_vit, swin
from vit_probe import InputError, load_model, mean_attention_distance, position_similarity
from vit_probe.models.reinitialize import random_weights
from vit_probe.results import weights_sha256


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_every_family(name: str) -> None:
    """No weight is what it was, no two matrices are alike, and the model runs and is measured."""
    family = FAMILIES[name]
    model = family.model()
    before = deepcopy(model.state_dict())
    drawn = random_weights(model, seed=7)  # not the one of the tests' own weights
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for (key, old), (_, new) in zip(model.named_parameters(), drawn.named_parameters(), strict=True):
        assert not (old == new).any() or old.ndim == 1, key
        if new.ndim > 1 and new.numel() > 100 and new.std() > 0:  # timm starts tables of relative positions at 0
            assert abs(np.corrcoef(old.detach().ravel(), new.detach().ravel())[0, 1]) < 0.5, key
            assert 0.005 < new.std() < 0.5, key
    x = family.images()
    with torch.no_grad():
        assert torch.isfinite(output(drawn(x))).all()
        assert not torch.allclose(output(drawn(x)), output(model(x)))
    result = mean_attention_distance(drawn, x, device="cpu")
    assert np.isfinite(result.distance).all()
    assert result.provenance["model"]["name"].endswith(", random weights (seed 7)")


def test_windows() -> None:
    drawn = random_weights(swin())
    assert np.nanmax(mean_attention_distance(drawn, images(48, 48), device="cpu").distance) > 0


def test_layers_start_as_their_classes_do() -> None:
    model = nn.Sequential(nn.Linear(100, 50), nn.LayerNorm(50), nn.BatchNorm1d(50))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
        model[2].running_mean.fill_(3)  # type: ignore[union-attr, operator]
    drawn = random_weights(model)
    linear, norm, batch = drawn  # type: ignore[misc]
    assert linear.weight.abs().max() <= 0.1
    assert linear.weight.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert linear.bias.abs().max() <= 0.1
    for one in (norm, batch):
        assert (one.weight == 1).all()
        assert (one.bias == 0).all()
    assert (batch.running_mean == 0).all()


def test_what_no_layer_starts_is_drawn() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls_token = nn.Parameter(torch.full((1, 1, 4000), 9.0))
            self.gamma = nn.Parameter(torch.full((4000,), 9.0))
            self.weight = nn.Parameter(torch.full((40,), 9.0))
            self.positions = nn.Embedding(40, 100)

    drawn: Any = random_weights(Raw())
    for parameter in (drawn.cls_token, drawn.gamma, drawn.positions.weight):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.1)
        assert abs(parameter.mean().item()) < 0.002
    assert (drawn.weight == 1).all()  # the scale of a norm


def test_multihead_attention_starts_as_torch_has_it() -> None:
    drawn: Any = random_weights(nn.MultiheadAttention(64, 4))
    assert drawn.in_proj_weight.abs().max() <= (6 / (64 + 3 * 64)) ** 0.5
    assert drawn.in_proj_weight.std() > 0.03
    assert (drawn.in_proj_bias == 0).all()
    assert (drawn.out_proj.bias == 0).all()


def test_the_seed_decides_and_nothing_else() -> None:
    model = small_vit()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = random_weights(model, seed=3)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    assert weights_sha256(one) == weights_sha256(random_weights(model, seed=3))
    assert weights_sha256(one) == weights_sha256(random_weights(random_weights(model), seed=3))  # whatever was there before
    assert weights_sha256(one) != weights_sha256(random_weights(model, seed=4))


def test_the_copy_is_prepared_for_as_the_model_is_and_has_its_type() -> None:
    model = load_model("demo").half()
    drawn: Any = random_weights(model)
    assert drawn.preprocessing == model.preprocessing
    assert drawn.name == "demo, random weights (seed 0)"
    assert {parameter.dtype for parameter in drawn.parameters()} == {torch.float16}
    assert not drawn.training


# What was never trained


def test_a_table_of_sines_stays() -> None:
    model = small_vit(position="sincos_2d", embed_dim=32)
    drawn: Any = random_weights(model)
    assert torch.equal(drawn.pos_embed, model.pos_embed)
    assert not torch.equal(drawn.cls_token, model.cls_token)
    similarity = position_similarity(drawn).similarity
    np.testing.assert_array_equal(similarity, position_similarity(model).similarity)


def test_a_frozen_model_does_not_tell_what_was_trained() -> None:
    model = small_vit().requires_grad_(False)
    with pytest.raises(InputError, match=r"VisionTransformer is frozen, .* call requires_grad_\(True\) on the parameters"):
        random_weights(model)
    frozen_layers = nn.Sequential(nn.Linear(3, 3)).requires_grad_(False)  # no table among them
    assert not torch.equal(random_weights(frozen_layers)[0].weight, frozen_layers[0].weight)  # type: ignore[index]


# What cannot be


class Stuck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def __deepcopy__(self, memo: Any) -> None:
        raise TypeError("cannot pickle '_thread.lock' object")


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.packed = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)


class Demanding(nn.Linear):
    def reset_parameters(self, scale: float | None = None) -> None:
        if scale is None and hasattr(self, "ready"):
            raise TypeError("reset_parameters() needs a scale")
        super().reset_parameters()
        self.ready = True


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Stuck(), r"Stuck cannot be copied \(TypeError: cannot pickle '_thread.lock' object\); pass a model as it was built"),
        (Quantised(), r"packed of Quantised is torch.int8, .* load the model without quantisation"),
        (Demanding(2, 2), r"a Demanding cannot be reset \(TypeError: reset_parameters\(\) needs a scale\)"),
    ],
)
def test_models_that_cannot_be_drawn(model: nn.Module, message: str) -> None:
    state = torch.get_rng_state()
    with pytest.raises(InputError, match=message):
        random_weights(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_tensors_that_hold_a_graph_cannot_be_copied() -> None:
    model = small_vit()
    model.last = model(images())
    with pytest.raises(InputError, match=r"VisionTransformer cannot be copied \(RuntimeError: .*before any forward pass"):
        random_weights(model)
