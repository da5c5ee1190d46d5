"""Options of another type than their measure's author gave them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch

import vit_probe
from tests.example_models import images, small_vit
from vit_probe import InputError, TokenGrid, head_measure, layer_measure, measure, offset_measure
from vit_probe.measures.base.option_types import check_options, option_types
from vit_probe.measures.base.registry import model_measure, streaming_measure

if TYPE_CHECKING:
    from somewhere import Unknown


def author(
    dx: Any,
    *,
    count: int = 1,
    ratio: float = 0.5,
    flag: bool = False,
    word: str = "",
    kind: Literal["mean", "max"] = "mean",
    size: int | tuple[int, int] | None = None,
    other: Unknown = None,
    free=None,
) -> None:
    """An author's function; one annotation cannot be evaluated, and one is missing."""


TYPES = option_types(author)


@pytest.mark.parametrize(
    "options",
    [
        {"count": np.int64(3)},
        {"ratio": 2},
        {"ratio": np.float32(2)},
        {"flag": np.True_},
        {"size": None},
        {"size": 3},
        {"size": [3, 4]},
        {"kind": "max"},
        {"other": "x"},
        {"free": "x"},
        {"unknown": 1},
    ],
)
def test_values_that_fit(options: dict[str, Any]) -> None:
    check_options(TYPES, options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"count": True}, "count must be a whole number; got True"),
        ({"count": 2.0}, "count must be a whole number; got 2.0"),
        ({"ratio": "a"}, "ratio must be a number; got 'a'"),
        ({"ratio": True}, "ratio must be a number; got True"),
        ({"ratio": None}, "ratio must be a number; got None"),
        ({"flag": "yes"}, "flag must be True or False; got 'yes'"),
        ({"flag": 1}, "flag must be True or False; got 1"),
        ({"word": 1}, "word must be a string; got 1"),
        ({"kind": "min"}, "kind must be one of mean, max; got 'min'"),
        ({"kind": torch.ones(2)}, r"kind must be one of mean, max; got tensor\("),
        ({"size": (1, "2")}, r"size must be a whole number or \(a whole number, a whole number\) or None; got \(1, '2'\)"),
    ],
)
def test_values_of_another_type(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        check_options(TYPES, options)


@pytest.mark.parametrize(
    "call",
    [
        lambda: vit_probe.local_mass(small_vit(), images(), radius="2"),
        lambda: vit_probe.local_mass.observer(TokenGrid(2, 3, (8, 8), 1, True), radius="2"),
        lambda: measure(small_vit(), images(), [partial(vit_probe.local_mass, radius="2")]),
        lambda: vit_probe.class_attention(small_vit(), images(), layer="last"),
        lambda: vit_probe.attention_rollout(small_vit(), images(), discard_ratio="a"),
        lambda: vit_probe.feature_spectrum(small_vit(), images(), per_image="yes"),
        lambda: vit_probe.patch_filters(small_vit(), components=2.5),
        lambda: vit_probe.position_similarity(small_vit(), after_layers="2"),
        lambda: measure(small_vit(), images(), [vit_probe.patch_filters], per_image="yes"),
    ],
)
def test_every_way_to_give_an_option(call: Any) -> None:
    with pytest.raises(InputError, match=r"(radius|layer|discard_ratio|per_image|components|after_layers) must be .*; got "):
        call()


@pytest.mark.parametrize("decorator", [offset_measure, head_measure, layer_measure, streaming_measure, model_measure])
def test_a_decorator_without_parentheses(decorator: Any) -> None:
    name = decorator.__name__
    with pytest.raises(InputError, match=rf"{name} takes keywords, not the function itself, got .*; write @{name}\(\w+=..."):
        decorator(author)
