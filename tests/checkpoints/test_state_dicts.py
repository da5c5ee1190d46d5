"""Models inside the checkpoints of many training programs. The tensors only tell where they come from."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vit_probe.checkpoints.state_dicts import find_state, stated_architecture
from vit_probe.errors import AssumptionWarning, InputError, UnsupportedArchitecture

FILE = Path("runs/checkpoint.pth")
NAMES = ("cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.1.norm1.weight", "norm.weight")
HUGGING_FACE = ("embeddings.patch_embeddings.projection.weight", "encoder.layer.0.layernorm_before.weight")
TORCHVISION = ("conv_proj.weight", "encoder.pos_embedding", "heads.head.weight")
OPTIMIZER = {"state": {0: {"step": torch.ones(1), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}}}


def model(value: float = 1.0, prefix: str = "", names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    return {prefix + name: torch.full((2,), value) for name in names}


def chunked(state: dict[str, Tensor], number: str) -> dict[str, Tensor]:
    return {re.sub(r"blocks\.(\d)", number, name): value for name, value in state.items()}


def itself() -> dict[str, Any]:
    content: dict[str, Any] = {"epoch": 1}
    return content | {"model": model(), "all": content}


def cycle() -> dict[str, Any]:
    content: dict[str, Any] = model()
    content["model"] = content
    return content


TRAINED: dict[str, Any] = {
    "a state dict": model(),
    "Parameters": {name: torch.nn.Parameter(value) for name, value in model().items()},
    "DataParallel": {"state_dict": model(prefix="module."), "optimizer": OPTIMIZER, "epoch": 3},
    "parameters beside the optimiser": model() | {"optimizer": OPTIMIZER, "epoch": 3, "lr": 0.1, "extra": None},
    "torch.compile": {"state_dict": model(prefix="_orig_mod.")},
    "torch.compile of parts": {name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in model().items()},
    "checkpointed activations": model(names=tuple(n.replace("norm1", "_checkpoint_wrapped_module.norm1") for n in NAMES)),
    "Lightning": {"state_dict": model(prefix="model._orig_mod.") | {"criterion.weight": torch.ones(1)}, "callbacks": {"a": {}}},
    "any depth and name": {"a": {"b": {"c": {"d": model(prefix="x.y.")}}}},
    "DeepSpeed": {"module": model(prefix="module."), "optimizer": None},
    "iBOT": {"state_dict": model(prefix="backbone.") | {"head.last_layer.weight_g": torch.ones(1)}},
    "SimMIM": {"model": model(prefix="encoder.") | {"decoder.0.weight": torch.ones(1)}},
    "image tower": {"state_dict": model(prefix="module.visual.trunk.") | {"module.text.ln.weight": torch.ones(1)}},
    "the same twice": {"state_dict": model(), "model": model(prefix="module.")},
    "DINOv2's chunks": {"teacher": chunked(model(prefix="backbone."), r"blocks.\1.\1") | {"dino_head.weight": torch.ones(1)}},
    "thop": model() | {"total_ops": torch.ones(1), "blocks.0.total_params": torch.ones(1)},
    "one chunk": {"teacher": chunked(model(), r"blocks.0.\1")},
    "a dictionary that holds itself": cycle(),
    "a dictionary inside itself": itself(),
}


@pytest.mark.parametrize("content", TRAINED.values(), ids=TRAINED.keys())
def test_one_model(content: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = find_state(content, FILE)
    assert list(state) == list(NAMES)
    assert all((value == 1).all() for value in state.values())


SEVERAL: dict[str, tuple[Any, str]] = {
    "DINO": (
        {"student": model(2, "module.backbone.") | {"module.head.weight": torch.ones(1)}, "teacher": model(1, "backbone.")},
        "teacher.backbone",
    ),
    "DINOv2": (
        {"model": chunked(model(2, "student.backbone._fsdp_wrapped_module.") | model(1, "teacher.backbone."), r"blocks.\1.\1")},
        "model.teacher.backbone",
    ),
    "I-JEPA": (
        {
            "encoder": model(2, "module."),
            "predictor": {"module.mask_token": torch.ones(1)},
            "target_encoder": model(1, "module."),
        },
        "target_encoder.module",
    ),
    "MoCo v3": (
        {"state_dict": model(2, "module.base_encoder.") | model(1, "module.momentum_encoder.")},
        "state_dict.module.mom",
    ),
    "timm": ({"state_dict": model(2), "state_dict_ema": model(1)}, "state_dict_ema"),
    "timm's trainer": ({"model": model(2), "model_ema": model(1)}, "model_ema"),
    "AveragedModel": (
        {"model": model(2), "swa_model": model(1, "module.") | {"n_averaged": torch.ones(1)}},
        "swa_model.module",
    ),
    "BYOL": (model(2, "online_encoder.") | model(1, "target_encoder."), "target_encoder"),
    "inside the trained one": (model(2) | {"ema": model(1)}, "ema"),
    "MoCo": (model(2, "module.encoder_q.") | model(1, "module.encoder_k."), "module.encoder_k"),
    "ALBEF": ({"model": model(2, "visual_encoder.") | model(1, "visual_encoder_m.")}, "model.visual_encoder_m"),
    "Lightning's average": ({"state_dict": model(1), "current_model_state": model(2)}, "state_dict"),
    "an average beside its model": (model(2, "ema.online_model.") | model(1, "ema.ema_model."), "ema.ema_model"),
    "an average in training": ({"model": model(2), "avg_model": model(1)}, "avg_model"),
    "a network's average": ({"net": model(2), "netEMA": model(1)}, "netEMA"),
    "the optimiser's average": ({"optimizer": {"ema": model(2)}, "model": model(1)}, "model"),
    "no average": ({"student": model(2), "network": model(1)}, "network"),
}


@pytest.mark.parametrize(("content", "taken"), SEVERAL.values(), ids=SEVERAL.keys())
def test_of_several_models_the_average_is_taken(content: Any, taken: str) -> None:
    with pytest.warns(AssumptionWarning, match=rf"checkpoint\.pth holds several Vision .*\(.*,.*\); {taken}.* is taken"):
        state = find_state(content, FILE)
    assert list(state) == list(NAMES)
    assert all((value == 1).all() for value in state.values())


def test_nothing_says_which_of_several_models_is_meant() -> None:
    with pytest.raises(InputError, match=r"several Vision Transformers, and nothing says which is meant: rgb, depth; save the"):
        find_state(model(1, "rgb.") | model(2, "depth."), FILE)


@pytest.mark.parametrize(
    ("others", "left_out"),
    [
        (("mask_token", "decoder_embed.weight", "decoder_blocks.0.norm1.weight"), "decoder_embed, decoder_blocks"),  # MAE
        (("head.0.weight", "head.1.running_mean"), "head"),  # MoCo v3
        (("fc.fc1.weight", "fc.bn1.running_mean"), "fc"),  # MSN
    ],
)
def test_parts_of_pretraining_are_left_out(others: tuple[str, ...], left_out: str) -> None:
    with pytest.warns(AssumptionWarning, match=rf"parts of pre-training beside the encoder, which are left out: {left_out}$"):
        state = find_state({"model": model() | model(2, names=others)}, FILE)
    assert set(state) - {"mask_token"} == set(NAMES)


def test_inside_the_prefix_nothing_else_is_left_out() -> None:
    content = model(prefix="backbone.") | {"backbone.rel_pos_bias.weight": torch.ones(1), "backbone.head.weight": torch.ones(1)}
    assert set(find_state(content, FILE)) == {*NAMES, "rel_pos_bias.weight", "head.weight"}


@pytest.mark.parametrize("prefix", ["", "model.", "model._orig_mod.module."])
def test_transformers_names(prefix: str) -> None:
    """A base model's name stands before its own parameters; its classifier stands beside them."""
    names = (*(f"vit.{name}" for name in HUGGING_FACE), "classifier.weight", "criterion.weight", "classifier.0.weight")
    state = find_state(model(prefix=prefix, names=names), FILE)
    assert list(state) == [*(f"vit.{name}" for name in HUGGING_FACE), "classifier.weight"]
    assert list(find_state(model(prefix=prefix, names=HUGGING_FACE), FILE)) == list(HUGGING_FACE)


def test_torchvision_names() -> None:
    assert list(find_state({"model": model(prefix="module.", names=TORCHVISION)}, FILE)) == list(TORCHVISION)
    network = ("block.conv_proj.weight", "fc.weight")
    assert list(find_state({"model": model(names=network)}, FILE)) == list(network)


def test_without_a_vision_transformer_the_largest_state_dict_is_returned() -> None:
    network = {"module.conv1.weight": torch.ones(1), "module.fc.weight": torch.ones(1)}
    assert list(find_state({"optimizer": OPTIMIZER, "best": {"value": torch.ones(1)}, "net": network}, FILE)) == [
        "conv1.weight",
        "fc.weight",
    ]


def test_blocks_numbered_anew_in_each_group() -> None:
    hierarchical = chunked(model(), r"blocks.\1.0")
    with pytest.raises(UnsupportedArchitecture, match=r"numbered anew in each group .* as in hierarchical models"):
        find_state(hierarchical, FILE)


def test_a_parameter_twice_and_a_parameter_that_is_no_tensor() -> None:
    with pytest.raises(InputError, match="holds a parameter twice"):
        find_state(model() | model(2, "_orig_mod."), FILE)
    with pytest.raises(InputError, match=r"holds norm\.bias as list, not as a tensor"):
        find_state(model() | {"norm.bias": [0.0]}, FILE)


@pytest.mark.parametrize("content", [None, 5, [torch.ones(1)], {}, {"model": {}}, {"model": {"epoch": 3}}, {1: {2: {}}}])
def test_no_parameters(content: Any) -> None:
    with pytest.raises(InputError, match=r"checkpoint\.pth holds no named parameters; save the model's state_dict"):
        find_state(content, FILE)


def test_endless_nesting() -> None:
    content: dict[str, Any] = model()
    for _ in range(100_000):
        content = {"model": content}
    with pytest.raises(InputError, match="holds no named parameters"):
        find_state(content, FILE)
    while content:  # without recursion, which would overflow the stack
        content = content.get("model", {})


STATED: dict[str, tuple[Any, str]] = {
    "beside the model": ({"arch": "vit_base_patch16_gap_224", "state_dict": model()}, "vit_base_patch16_gap_224"),
    "around it": ({"model": "timm/vit_tiny_patch16_224.augreg", "a": {"b": model(prefix="x.")}}, "vit_tiny_patch16_224.augreg"),
    "among the options": ({"args": {"model": "deit_small_patch16_224"}, "model": model()}, "deit_small_patch16_224"),
    "nearer": ({"arch": "vit_base_patch16_224", "a": {"arch": "vit_base_patch8_224", "b": model()}}, "vit_base_patch8_224"),
    "of another model": ({"teacher": {"arch": "vit_base_patch16_224"}, "model": model()}, ""),
    "no name of timm's": ({"arch": "vit_small", "state_dict": model()}, ""),
    "no name": ({"arch": 5, "state_dict": model()}, ""),
    "a dictionary inside itself": (itself() | {"arch": "vit_base_patch16_224"}, "vit_base_patch16_224"),
}


@pytest.mark.parametrize(("content", "name"), STATED.values(), ids=STATED.keys())
def test_the_architecture_that_a_checkpoint_states(content: Any, name: str) -> None:
    assert stated_architecture(content, find_state(content, FILE)) == name


def test_messages_hold_no_control_characters() -> None:
    with pytest.warns(AssumptionWarning, match=r"\(ema, a\\x1bb\)"):
        find_state({"ema": model(), "a\x1bb": model(2)}, FILE)
