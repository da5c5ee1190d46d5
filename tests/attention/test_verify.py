"""attention_hooks(..., verify=True): the same call without hooks, compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.attention.test_hooks import Attention, leaves_nothing, qkv
from tests.example_models import FAMILIES, Assemble, images, small_vit
from vit_probe import InputError, attention_hooks
from vit_probe.attention.intercept import ForwardStopped
from vit_probe.attention.tiles import TiledAttention


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes(name: str) -> None:
    model, x = FAMILIES[name].model(), FAMILIES[name].images()
    with torch.no_grad():
        untouched = FAMILIES[name].model()(x)
    with leaves_nothing(model), attention_hooks(model, recorded := Assemble(), verify=True):
        result = model(x)
    assert len(recorded.tiles) == 2  # the repeated call is not shown
    assert type(result) is type(untouched)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("part", [1.0, 0.9])
def test_attention_that_is_a_tenth_off_is_detected_in_any_precision(
    dtype: torch.dtype, part: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(self: TiledAttention, *args: Any) -> Tensor | None:
        output = compute(self, *args)
        return None if output is None else output * part

    compute = TiledAttention.__call__
    monkeypatch.setattr(TiledAttention, "__call__", off)
    model, inputs = Attention(), [tensor.to(dtype) for tensor in qkv()]
    if part == 1.0:
        with attention_hooks(model, Assemble(), verify=True):
            model(*inputs)
    else:
        with (
            leaves_nothing(model),
            pytest.raises(RuntimeError, match=r"differs by up to .* but rounding explains only .* do not trust"),
            attention_hooks(model, Assemble(), verify=True),
        ):
            model(*inputs)


def test_random_numbers_are_the_same_and_continue_as_without_hooks() -> None:
    model, x = small_vit(dropout=0.5).train(), images()
    torch.manual_seed(3)
    untouched, after = model(x), torch.rand(3)
    torch.manual_seed(3)
    with attention_hooks(model, verify=True):
        result = model(x)
    torch.testing.assert_close(result, untouched, atol=1e-5, rtol=0)
    assert torch.equal(torch.rand(3), after)
    result.sum().backward()


def test_a_model_whose_calls_differ_is_detected() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = small_vit(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x)[..., : 1 + self.calls]

    model = Counts()
    with pytest.raises(RuntimeError, match=r"with hooks .* shapes \[\(3, 2\)\], without them of \[\(3, 3\)\]"):  # noqa: SIM117
        with attention_hooks(model, verify=True):
            model(images())


def test_autocast_has_the_tolerance_of_its_own_type() -> None:
    model, x = FAMILIES["timm"].model(), FAMILIES["timm"].images()
    with torch.autocast("cpu", dtype=torch.bfloat16), attention_hooks(model, verify=True):
        model(x)


def test_nan_equals_nan() -> None:
    model = small_vit()
    with attention_hooks(model, verify=True):
        model(images() * torch.nan)


def test_an_output_without_tensors() -> None:
    class Silent(nn.Module):
        def forward(self, *inputs: Tensor) -> str:
            torch.nn.functional.scaled_dot_product_attention(*inputs)
            return "done"

    model = Silent()
    with pytest.raises(InputError, match="returns a str without tensors"), attention_hooks(model, verify=True):
        model(*qkv())


def test_an_error_if_only_parts_were_called() -> None:
    model = small_vit()
    with pytest.raises(InputError, match="only parts of it were called; call the model itself"):  # noqa: SIM117
        with attention_hooks(model, verify=True):
            model.forward_features(images())


def test_calls_that_end_early_are_not_checked() -> None:
    model = small_vit()
    with leaves_nothing(model), attention_hooks(model, verify=True) as hooks:
        hooks.stop_after = 0
        with pytest.raises(ForwardStopped):
            model(images())
        hooks.stop_after = None
        model(images())


def test_the_repeated_call_takes_the_fast_path_again() -> None:
    """So that the comparison is with the untouched model."""
    model, x = FAMILIES["encoder"].model(), FAMILIES["encoder"].images()
    states: list[bool] = []
    model.proj.register_forward_hook(lambda *_: states.append(torch.backends.mha.get_fastpath_enabled()))
    was = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(True)
        with attention_hooks(model, verify=True):
            model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(was)
    assert states == [False, True]
