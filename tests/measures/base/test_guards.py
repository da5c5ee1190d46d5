"""What a measure's author can get wrong is said, before it spoils other numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.example_models import images, small_vit
from vit_probe import (
    InputError,
    TokenGrid,
    attention_entropy,
    head_measure,
    layer_measure,
    local_mass,
    mean_attention_distance,
    measure,
    offset_measure,
)
from vit_probe.tokens.grid import Windows

pytestmark = pytest.mark.usefixtures("own_registry")

HEAD, LAYER, OFFSET = (
    decorator(unit="share", reference="a test") for decorator in (head_measure, layer_measure, offset_measure)
)


def run(*measures: Callable[..., Any]) -> list[Any]:
    return measure(small_vit(), images(), measures, device="cpu")


def test_a_measure_that_writes_to_attention_is_stopped() -> None:
    @HEAD
    def writes_to_attention(attention: Any) -> dict[str, torch.Tensor]:
        return {"largest": attention.weights.clamp_(max=0.01).amax(dim=-1)}

    with pytest.raises(InputError, match="writes_to_attention wrote to the tensor that it was given; work on a copy"):
        run(writes_to_attention, attention_entropy)


def test_a_measure_that_writes_to_hidden_states_is_stopped() -> None:
    @LAYER
    def writes_to_tokens(tokens: torch.Tensor, grid: Any) -> dict[str, torch.Tensor]:
        return {"norm": tokens.mul_(2).norm(dim=-1).mean(dim=-1)}

    with pytest.raises(InputError, match="writes_to_tokens wrote to the tensor that it was given; work on a copy"):
        run(writes_to_tokens, attention_entropy)


@pytest.mark.parametrize("name", ["uniform_mass", "values", "plot", "std", "_private", "layer"])
def test_names_that_the_table_or_the_result_needs(name: str) -> None:
    @HEAD
    def badly_named(attention: Any) -> dict[str, torch.Tensor]:
        return {name: attention.to_self}

    with pytest.raises(InputError, match=f"a value is called '{name}'; names must be identifiers"):
        run(badly_named)


def test_a_value_is_not_called_as_its_axis() -> None:
    @layer_measure(unit="norm", reference="a test", axis="patch")
    def norms(tokens: torch.Tensor, grid: Any) -> dict[str, torch.Tensor]:
        return {"patch": tokens.norm(dim=-1)}

    with pytest.raises(InputError, match="a value of norms is called 'patch' like its axis; choose another name"):
        run(norms)


def test_the_name_of_a_measure_of_the_package_is_taken() -> None:
    with pytest.raises(InputError, match="vit_probe has a measure token_norms already; choose another name for token_norms"):

        @HEAD
        def token_norms(attention: Any) -> dict[str, torch.Tensor]:
            return {"mine": attention.to_self}


def test_options_need_a_default_and_a_name_of_their_own() -> None:
    with pytest.raises(InputError, match="the option radius of the measure near has no default; give it one"):

        @OFFSET
        def near(dx: torch.Tensor, dy: torch.Tensor, *, radius: float) -> torch.Tensor:
            return dx

    with pytest.raises(InputError, match="the option prefix of far is one that all measures have; choose another name"):

        @OFFSET
        def far(dx: torch.Tensor, dy: torch.Tensor, *, prefix: float = 1.0) -> torch.Tensor:
            return dx

    with pytest.raises(InputError, match="the measure loose takes"):

        @OFFSET
        def loose(dx: torch.Tensor, dy: torch.Tensor, **options: float) -> torch.Tensor:
            return dx


def test_choices_of_the_decorators() -> None:
    with pytest.raises(InputError, match="attention must be one of paid, received; got 'given'"):
        head_measure(unit="share", reference="a test", attention="given")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="offsets must be one of pixels, patches; got 'metres'"):
        offset_measure(unit="share", reference="a test", offsets="metres")  # type: ignore[arg-type]


@pytest.mark.parametrize("radius", [-1.0, float("nan")])
def test_a_radius_is_not_negative(radius: float) -> None:
    with pytest.raises(InputError, match="radius must be 0 or more patches"):
        run(partial(local_mass, radius=radius))


def test_windows_with_other_patches_are_not_merged() -> None:
    grid = TokenGrid(2, 2, (8, 8), 0, False)
    rows, cols = (Windows(grid, torch.tensor(patches)) for patches in ([[0, 1], [2, 3]], [[0, 2], [1, 3]]))
    one, other = (mean_attention_distance.observer(grid, windows={0: windows}) for windows in (rows, cols))
    with pytest.raises(InputError, match="within other windows; measure images of one size with one model"):
        one.merge(other)
    one.merge(mean_attention_distance.observer(grid, windows={0: rows}))  # the same windows are no error
