"""Arguments of another type get a sentence that says what to pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.example_models import images, small_vit
from vit_probe import (
    InputError,
    VisionTransformer,
    attention_entropy,
    head_measure,
    layer_measure,
    mean_attention_distance,
    measure,
    offset_measure,
    overview,
    patch_filters,
    position_similarity,
    representation_similarity,
)
from vit_probe.runner.arguments import select_device


@pytest.mark.parametrize(
    "measured",
    [
        mean_attention_distance,
        representation_similarity,
        overview,
        lambda model, _: patch_filters(model),
        lambda model, _: position_similarity(model),
        lambda model, pictures: measure(model, pictures, [patch_filters]),
    ],
)
@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("demo", r"must be a torch.nn.Module, got 'demo'; pass load_model\('demo'\)"),
        (VisionTransformer, r"got the class VisionTransformer; load_model\(...\) returns one"),
        (None, r"got NoneType; load_model\(...\) returns one"),
        ({"weights": torch.zeros(1)}, "got dict; load_model"),
        (nn.Linear(3, 3, device="meta"), "Linear has parameters on the meta device"),
    ],
)
def test_no_model(measured: Any, model: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        measured(model, images())


def test_swapped_arguments() -> None:
    for call in (mean_attention_distance, overview, partial(measure, measures=[attention_entropy])):
        with pytest.raises(InputError, match="got Tensor; swap the two arguments: the model comes first"):
            call(images(), small_vit())
        with pytest.raises(InputError, match="the images are a model, VisionTransformer; pass photographs"):
            call(small_vit(), small_vit())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"grid": 5}, r"grid must be a TokenGrid, such as TokenGrid\(14, 14, .*got 5"),
        ({"grid": (3, 4)}, r"or None; got \(3, 4\)"),
        ({"preprocessing": "imagenet"}, "preprocessing must be a Preprocessing, such as .*got 'imagenet'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"batch_size": "16"}, "at least 1, got '16'"),
        ({"batch_size": 2.5}, "at least 1, got 2.5"),
        ({"batch_size": None}, "at least 1, got None"),
        ({"batch_size": True}, "at least 1, got True"),
        ({"device": 3}, "device must be a name such as auto, cpu, cuda or mps, got 3"),
        ({"device": None}, "got None"),
    ],
)
def test_options_of_another_type(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        mean_attention_distance(small_vit(), images(), **options)


@pytest.mark.parametrize("chosen", [mean_attention_distance, "attention_distance", None, 3])
def test_measures_that_are_no_list(chosen: Any) -> None:
    with pytest.raises(InputError, match=r"measures must be a list, such as \[mean_attention_distance, attention_entropy\]"):
        measure(small_vit(), images(), chosen)


def test_measures_in_any_collection() -> None:
    assert measure(small_vit(), images(), iter((attention_entropy,)), device="cpu")[0].num_images == 3


@pytest.mark.parametrize("decorator", [offset_measure, head_measure, layer_measure])
@pytest.mark.parametrize("author", [torch.hypot, partial(torch.sub, alpha=2), nn.Identity(), "hypot"])
def test_a_measure_that_is_no_function(decorator: Any, author: Any) -> None:
    with pytest.raises(InputError, match=r"a measure must be a function written with def, got .*; write one that calls it"):
        decorator(unit="pixels", reference="a test")(author)


@pytest.mark.parametrize(
    "name",
    ["meta", "cuda:99", "xla", "xpu", "hpu", "warp", "", "cpu:-1", "cuda:99999999999999", torch.device("meta")],
)
def test_devices_that_are_not_there(name: Any) -> None:
    with pytest.raises(InputError, match=rf"device '{name}' is not available \(.{{1,250}}\); choose auto, cpu, cuda or mps"):
        select_device(name)
