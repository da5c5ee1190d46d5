"""Arguments of another type get a sentence that says what to pass, wherever a model or an observer is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.example_models import small_vit
from vit_probe import (
    InputError,
    TokenGrid,
    VisionTransformer,
    ViTConfig,
    attention_hooks,
    mean_attention_distance,
    save_model,
)
from vit_probe.tokens.locate import locate_tokens


def hook(*arguments: Any, **options: Any) -> None:
    with attention_hooks(*arguments, **options):
        pass


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["demo"], r"must be a torch.nn.Module, got 'demo'; pass load_model\('demo'\)"),
        ([torch.zeros(1, 3, 16, 24), small_vit()], "got Tensor; swap the two arguments: the model comes first"),
        ([small_vit(), "x"], r"an observer must have a method update\(tile\), .*, got 'x'; pass, for example"),
        ([small_vit(), mean_attention_distance], "got <function mean_attention_distance"),
        ([small_vit(), nn.Identity()], "got the module Identity; pass"),
        ([small_vit(), dict], r"an observer must be an object, got the class dict; pass dict\(...\)"),
    ],
)
def test_hooks(arguments: list[Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        hook(*arguments)


def test_the_size_of_tiles() -> None:
    for size in ("1", 0, None):
        with pytest.raises(InputError, match=f"tile_bytes must be a positive number, got {size!r}"):
            hook(small_vit(), tile_bytes=size)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("demo", 16, 24), "must be a torch.nn.Module, got 'demo'"),
        ((small_vit(), 16.0, 24), "height must be a positive whole number, got 16.0"),
        ((small_vit(), 16, True), "width must be a positive whole number, got True"),
        ((small_vit(), 24 * 10**8, 24 * 10**8), "an image of 2400000000 x 2400000000 pixels does not fit into memory"),
    ],
)
def test_where_tokens_are_located(arguments: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        locate_tokens(*arguments)


def test_grids_and_channels_where_tokens_are_located() -> None:
    with pytest.raises(InputError, match=r"grid must be a TokenGrid, .*; got \(2, 3\)"):
        locate_tokens(small_vit(), 16, 24, grid=(2, 3))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="channels must be a positive whole number, got 'RGB'"):
        locate_tokens(small_vit(), 16, 24, channels="RGB")  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["demo", nn.Linear(2, 2)])
def test_what_cannot_be_saved(model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"save_model takes a VisionTransformer of vit_probe, got ('demo'|Linear); pass"):
        save_model(model, tmp_path / "model.safetensors")


@pytest.mark.parametrize("config", ["B/16", {"depth": 2}, ViTConfig])
def test_a_model_of_no_configuration(config: Any) -> None:
    with pytest.raises(InputError, match=r"must be a ViTConfig, got ('B/16'|dict|type); pass ViTConfig.variant\('B/16'\)"):
        VisionTransformer(config)


@pytest.mark.parametrize(
    "fields", [{"patch_size": 8}, {"rows": "8"}, {"cols": 8.5}, {"num_prefix_tokens": None}, {"class_token": "first"}]
)
def test_a_grid_of_other_types(fields: dict[str, Any]) -> None:
    given = {"rows": 8, "cols": 8, "patch_size": (8, 8), "num_prefix_tokens": 1, "has_cls_token": True} | fields
    with pytest.raises(InputError, match=r"a token grid has whole numbers of rows, .* as in TokenGrid\(14, .*; got TokenGrid"):
        TokenGrid(**given)
