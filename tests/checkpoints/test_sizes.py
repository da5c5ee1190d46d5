"""Configurations that describe far larger models than the weights hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from vit_probe.checkpoints import load_model
from vit_probe.checkpoints.sizes import check_depth, check_sides
from vit_probe.errors import InputError


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 0},
        {"vision_config": {"num_hidden_layers": -2}},
        {"model_args": {"depth": 41}},
        {"depths": [2, 2, 10**30, 2]},
        {"encoder_layers": 10**6},
    ],
)
def test_more_layers_than_parameters(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"config\.json has \w+ -?\d+, but the weights hold 40 parameters"):
        check_depth(config, num_parameters=40)


def test_other_numbers() -> None:
    check_depth({"max_depth": 80, "depth": 40, "depths": [2, 2], "vision_feature_layer": -2, "num_layers": None}, 40)


@pytest.mark.parametrize("arguments", [{"embed_dim": 30_720}, {"in_chans": 100_000}])
def test_timm_takes_no_memory_for_a_model_that_is_far_larger_than_its_weights(
    arguments: dict[str, int], tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm")
    name = "eva02_tiny_patch14_224"
    model = timm.create_model(name, img_size=28, depth=1, num_classes=0)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    config = {
        "architecture": name, "num_classes": 0, "pretrained_cfg": {"input_size": [3, 28, 28], "first_conv": "patch_embed.proj"},
        "model_args": {"img_size": 28, "depth": 1} | arguments,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"describes a model of \d+ parameters, but the weights hold \d+\)$"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "processor", [{"size": 10**6}, {"size": {"shortest_edge": 10**6}}, {"size": {}, "crop_size": {"height": 10**6}}]
)
def test_absurd_sides(processor: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"the image processor has \w+ 1000000; at most 16384 pixels are supported"):
        check_sides(processor)
    check_sides({"size": {"shortest_edge": 65_536, "longest_edge": 10**8}})  # numbers of pixels
