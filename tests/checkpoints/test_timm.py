"""Our model against timm's own, with timm's weights."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import nn

from tests.checkpoints.parity import assert_same, images, randomize
from vit_probe.checkpoints import load_model
from vit_probe.errors import AssumptionWarning, InputError, UnsupportedArchitecture

timm = pytest.importorskip("timm")

from timm.layers import SwiGLUPacked  # noqa: E402
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import ResPostBlock, VisionTransformer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::vit_probe.errors.AssumptionWarning")

TINY: dict[str, Any] = {
    "img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 7, "dynamic_img_size": True
}  # fmt: skip
CLIP: dict[str, Any] = {"pre_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-5)}

# Arguments of timm's model, and overrides for what its parameters do not determine.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "no head": ({"num_classes": 0}, {}),
    "gap": ({"global_pool": "avg", "class_token": False}, {}),
    "gap, class token kept": ({"global_pool": "avg"}, {}),
    "gap after the norm": ({"global_pool": "avg", "class_token": False, "fc_norm": False}, {}),
    "no qkv bias": ({"qkv_bias": False}, {}),
    "layer scale, class token without position": ({"init_values": 1e-5, "no_embed_class": True}, {}),
    "DINOv2": ({"init_values": 1e-5}, {}),
    "DINOv2 with registers": ({"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True}, {}),
    "registers with positions": ({"reg_tokens": 3}, {}),
    "SwiGLU": ({"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 16 / 3, "init_values": 1e-5}, {}),
    "CLIP": (CLIP, {}),
    "CLIP with quick GELU": (CLIP | {"act_layer": "quick_gelu"}, {"activation": "quick_gelu"}),
    "qk norm": ({"qk_norm": True}, {"num_heads": None}),
    "patches that are not square": ({"patch_size": (8, 16), "img_size": (48, 96)}, {}),
    "two input channels": ({"in_chans": 2}, {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_timm(family: str, tmp_path: Path) -> None:
    arguments, overrides = FAMILIES[family]
    theirs = randomize(VisionTransformer(**(TINY | arguments)))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    asked = {"num_heads": 4} | overrides
    ours = load_model(tmp_path / "model.safetensors", **{name: value for name, value in asked.items() if value is not None})
    assert ours.config.num_heads == 4
    channels = arguments.get("in_chans", 3)
    for size in ((48, 96), (64, 64), (32, 80)) if "patches" in family else ((48, 48), (64, 64), (40, 72)):
        batch = images(*size)[:, :channels]
        with torch.no_grad():
            assert_same(ours.forward_features(batch), theirs.forward_features(batch))
            assert_same(ours(batch), theirs(batch))


@pytest.mark.parametrize("num_classes", [7, 0])
def test_distilled_deit_averages_two_heads(num_classes: int, tmp_path: Path) -> None:
    theirs = randomize(VisionTransformerDistilled(**(TINY | {"num_classes": num_classes})))
    save_file(theirs.state_dict(), tmp_path / "deit.safetensors")
    ours = load_model(tmp_path / "deit.safetensors", num_heads=4)
    assert ours.config.pooling == "distilled"
    for size in ((48, 48), (40, 72)):
        with torch.no_grad():
            assert_same(ours(images(*size)), theirs(images(*size)))


def test_non_square_images_need_image_size(tmp_path: Path) -> None:
    theirs = randomize(VisionTransformer(**(TINY | {"img_size": (32, 56)})))
    save_file(theirs.state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(
        InputError, match=r"29 entries with 1 prefix tokens \(it is not a square\); pass image_size=\(height, width\)"
    ):
        load_model(tmp_path / "wide.safetensors", num_heads=4)
    ours = load_model(tmp_path / "wide.safetensors", num_heads=4, image_size=(32, 56))
    assert ours.config.image_size == (32, 56)
    for size in ((32, 56), (48, 48)):
        with torch.no_grad():
            assert_same(ours(images(*size)), theirs(images(*size)))


HYBRIDS = {
    "vit_small_r26_s32_224": ({"depth": 2, "img_size": 96}, (2, 2, 2, 2), ((96, 96), (64, 128))),
    "vit_tiny_r_s16_p8_224": ({"depth": 2, "img_size": 96}, (), ((96, 96), (64, 128))),
    "vit_base_r50_s16_224": ({"img_size": 224}, (3, 4, 9), ((224, 224), (96, 160))),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_agree_with_timm(name: str, tmp_path: Path) -> None:
    arguments, layers, sizes = HYBRIDS[name]
    theirs = randomize(timm.create_model(name, num_classes=11, dynamic_img_size=True, **arguments))
    save_file(theirs.state_dict(), tmp_path / "hybrid.safetensors")
    ours = load_model(tmp_path / "hybrid.safetensors")
    assert ours.config.stem is not None
    assert ours.config.stem.layers == layers
    for size in sizes:
        batch = images(*size, batch=1)
        with torch.no_grad():
            assert_same(ours(batch), theirs(batch))
    # The feature map itself in float64: a deep ResNet with random group norms amplifies float32's rounding to 3e-4.
    with torch.no_grad():
        batch = images(64, 96, batch=1).double()
        stem = theirs.double().patch_embed.backbone(batch)
        stem = stem[-1] if isinstance(stem, list) else stem
        assert_same(ours.double().patch_embed.backbone(batch), stem, tolerance=1e-10)


def test_a_hub_folder_states_what_shapes_do_not(tmp_path: Path) -> None:
    theirs = randomize(timm.create_model("vit_base_patch32_clip_quickgelu_224", depth=2, img_size=64, num_classes=5))
    timm.models.save_for_hf(theirs, tmp_path / "clip", safe_serialization=True)
    ours = load_model(tmp_path / "clip")
    assert ours.name == "clip"
    assert (ours.config.activation, ours.config.norm_eps, ours.config.num_heads) == ("quick_gelu", 1e-5, 12)
    with torch.no_grad():
        assert_same(ours(images(64)), theirs(images(64)))


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_a_published_size_with_timms_preprocessing(name: str, tmp_path: Path) -> None:
    theirs = randomize(timm.create_model(name))
    timm.models.save_for_hf(theirs, tmp_path / name, safe_serialization=False)
    ours = load_model(tmp_path / name)
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    assert ours.preprocessing is not None
    prepared = ours.preprocessing(photograph)
    assert torch.equal(prepared, transform(photograph))
    with torch.no_grad():
        assert_same(ours(prepared[None]), theirs(prepared[None]))


def test_squash_is_an_exact_resize_and_border_is_not_supported(tmp_path: Path) -> None:
    from vit_probe.checkpoints.timm import from_state_dict

    state = randomize(VisionTransformer(**TINY)).state_dict()
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"input_size": [3, 48, 40], "crop_pct": 0.8}}
    config["pretrained_cfg"]["crop_mode"] = "squash"  # type: ignore[index]
    squash = from_state_dict(state, {"num_heads": 4}, config).preprocessing
    assert squash is not None
    assert (squash.size, squash.resize, squash.interpolation) == ((48, 40), (60, 50), "bicubic")
    config["pretrained_cfg"]["crop_mode"] = "border"  # type: ignore[index]
    assert from_state_dict(state, {"num_heads": 4}, config).preprocessing is None


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict", "teacher"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_training_checkpoints_are_unwrapped(wrapper: str, prefix: str, tmp_path: Path) -> None:
    theirs = randomize(VisionTransformer(**TINY))
    state = {prefix + name: value for name, value in theirs.state_dict().items()}
    if "backbone" in prefix:
        state[prefix.replace("backbone.", "head.") + "mlp.0.weight"] = torch.zeros(2, 2)  # DINO's projection head
    torch.save({wrapper: state, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "training.pth")
    with torch.no_grad():
        assert_same(load_model(tmp_path / "training.pth", num_heads=4)(images(48)), theirs(images(48)))


def test_the_original_dinov2_names(tmp_path: Path) -> None:
    """SwiGLU is named w12 and w3, registers register_tokens; the position table covers the class token but no registers."""
    theirs = randomize(
        VisionTransformer(**(TINY | FAMILIES["SwiGLU"][0] | {"reg_tokens": 4, "no_embed_class": True, "num_classes": 0}))
    )
    state = dict(theirs.state_dict())
    state["register_tokens"] = state.pop("reg_token")
    first = torch.randn(1, 1, 32)
    state["pos_embed"] = torch.cat([first, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - first
    state["mask_token"] = torch.zeros(1, 32)
    state = {name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value for name, value in state.items()}
    torch.save(state, tmp_path / "dinov2.pth")
    ours = load_model(tmp_path / "dinov2.pth", num_heads=4)
    assert (ours.config.position_prefix, ours.config.num_registers) == (1, 4)
    with torch.no_grad():
        assert_same(ours(images(48)), theirs(images(48)))


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    theirs = randomize(VisionTransformer(**TINY)).half()
    save_file(theirs.state_dict(), tmp_path / "half.safetensors")
    ours = load_model(tmp_path / "half.safetensors", num_heads=4)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    with torch.no_grad():
        assert_same(ours(images(48)), theirs.float()(images(48)))


def _load(tmp_path: Path, change: dict[str, Any], remove: tuple[str, ...] = (), **overrides: Any) -> None:
    state = dict(randomize(VisionTransformer(**TINY)).state_dict()) | change
    save_file({name: value for name, value in state.items() if name not in remove}, tmp_path / "changed.safetensors")
    load_model(tmp_path / "changed.safetensors", **overrides)


def test_errors_explain_the_problem(tmp_path: Path) -> None:
    heads = {"num_heads": 4}
    with pytest.raises(InputError, match=r"how many attention heads a layer has.*width of 32; pass num_heads="):
        _load(tmp_path, {})
    with pytest.raises(InputError, match="embed_dim 32 is not divisible by num_heads 5"):
        _load(tmp_path, {}, num_heads=5)
    with pytest.raises(InputError, match="ViTConfig has no field heads"):
        _load(tmp_path, {}, heads=4)
    with pytest.raises(InputError, match=r"missing: blocks\.1\.norm1\.bias, blocks\.1\.norm1\.weight"):
        _load(tmp_path, {}, ("blocks.1.norm1.weight", "blocks.1.norm1.bias"), **heads)
    with pytest.raises(InputError, match=r"unexpected: blocks\.0\.gamma_3"):
        _load(tmp_path, {"blocks.0.gamma_3": torch.ones(32)}, **heads)
    with pytest.raises(InputError, match=r"wrongly shaped: norm\.weight \(31,\) instead of \(32,\)"):
        _load(tmp_path, {"norm.weight": torch.ones(31)}, **heads)
    with pytest.raises(InputError, match=r"incomplete: it holds no parameter blocks\.0\.mlp\.fc2\.weight"):
        _load(tmp_path, {}, ("blocks.0.mlp.fc2.weight",), **heads)
    with pytest.raises(InputError, match=r"patch_embed\.proj\.weight should have 4 axes.*\(32, 192\)"):
        _load(tmp_path, {"patch_embed.proj.weight": torch.zeros(32, 192)}, **heads)
    with pytest.raises(InputError, match=r"\(32, 3, 2, 8, 8\), as in a model of videos"):
        _load(tmp_path, {"patch_embed.proj.weight": torch.zeros(32, 3, 2, 8, 8)}, **heads)
    with pytest.raises(InputError, match=r"table of 43 entries with 1 prefix tokens \(it is not a square\); pass image_size="):
        _load(tmp_path, {"pos_embed": torch.zeros(1, 43, 32)}, **heads)
    with pytest.raises(
        InputError, match=r"37 entries, which does not fit images of 64 x 64 pixels \(64 patches.*model\.resize"
    ):
        _load(tmp_path, {}, image_size=64, **heads)
    with pytest.raises(InputError, match=r"no position table.*pass position='none', .*rotary"):
        _load(tmp_path, {}, ("pos_embed",), **heads)
    with pytest.raises(InputError, match=r"hidden layer before the head \(pre_logits\).*pass num_classes=0"):
        _load(tmp_path, {"pre_logits.fc.weight": torch.zeros(32, 32)}, **heads)
    _load(tmp_path, {"pre_logits.fc.weight": torch.zeros(32, 32)}, num_classes=0, **heads)
    _load(tmp_path, {}, ("pos_embed",), position="none", **heads)


def test_an_ambiguous_grid_needs_image_size(tmp_path: Path) -> None:
    """Nine entries are 3 x 3 patches, or 2 x 2 patches with a class token and four registers."""
    theirs = randomize(VisionTransformer(**(TINY | {"img_size": 16, "reg_tokens": 4})))
    save_file(theirs.state_dict(), tmp_path / "nine.safetensors")
    with pytest.raises(InputError, match=r"9 entries with 5 prefix tokens \(more than one square fits\)"):
        load_model(tmp_path / "nine.safetensors", num_heads=4)
    for overrides in ({"image_size": 16}, {"position_prefix": 5}):
        with torch.no_grad():
            assert_same(load_model(tmp_path / "nine.safetensors", num_heads=4, **overrides)(images(16)), theirs(images(16)))


@pytest.mark.parametrize(
    ("architecture", "extra", "message"),
    [
        ("vit_base_patch16_rpn_224", {}, "layer norms after the residual branches"),
        ("vit_base_patch16_224", {"model_args": {"act_layer": "relu"}}, "is built with act_layer='relu'"),
        (
            "vit_base_patch16_224",
            {"model_args": {"num_heads": 4, "pool_include_prefix": True, "block_fn": "mine"}},
            "is built with block_fn='mine', pool_include_prefix=True, which",
        ),
        (
            "vit_base_patch16_siglip_224",
            {"global_pool": "map"},
            "pools its tokens by 'map'; VisionTransformer supports token, avg",
        ),
    ],
)
def test_architectures_that_compute_something_else_are_rejected(architecture: str, extra: dict[str, Any], message: str) -> None:
    from vit_probe.checkpoints.timm import from_state_dict

    state = randomize(VisionTransformer(**TINY)).state_dict()
    with pytest.raises(InputError, match=message):
        from_state_dict(state, {"num_heads": 4}, {"architecture": f"{architecture}.v2_webli", **extra})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_base_patch16_clip_quickgelu_224.openai.pth", CLIP | {"act_layer": "quick_gelu"}),
        ("my-quick-gelu-model.safetensors", {"act_layer": "quick_gelu"}),
        ("vit_so400m_patch16_siglip_gap_256/model.safetensors", {"act_layer": "gelu_tanh"}),
    ],
)
def test_the_name_of_a_file_or_its_folder_tells_the_activation(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    theirs = randomize(VisionTransformer(**(TINY | arguments)))
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (torch.save if path.suffix == ".pth" else save_file)(theirs.state_dict(), path)
    with torch.no_grad():
        assert_same(load_model(path, num_heads=4)(images(48)), theirs(images(48)))


def _warnings(path: Path, **overrides: Any) -> str:
    with pytest.warns(AssumptionWarning) as caught:
        load_model(path, **overrides)
    return " ".join(str(warning.message) for warning in caught if "photographs" not in str(warning.message))


def test_what_was_assumed_is_said(tmp_path: Path) -> None:
    theirs = randomize(VisionTransformer(**(TINY | {"embed_dim": 192})))
    torch.save(theirs.state_dict(), tmp_path / "mine.pth")
    everything = (
        "3 are assumed, as in published models of width 192, with activation='gelu', norm_eps=1e-06, pooling='token', layer "
        "norms before the branches (if that is wrong: from Python, pass num_heads=, activation=, norm_eps=, pooling= to"
    )
    assert everything in _warnings(tmp_path / "mine.pth")
    assert "assumed are norm_eps=1e-06, pooling='token' (if" in _warnings(
        tmp_path / "mine.pth", num_heads=4, activation="quick_gelu"
    )
    torch.save(theirs.state_dict(), tmp_path / "vit_tiny_patch16_224.augreg.pth")
    assert _warnings(tmp_path / "vit_tiny_patch16_224.augreg.pth") == ""
    # The architecture of these weights exists with both activations, so that one remains an assumption.
    torch.save(VisionTransformer(**(TINY | CLIP | {"embed_dim": 192})).state_dict(), tmp_path / "ViT-B-16-openai.pt")
    assert "with activation='quick_gelu', norm_eps=1e-05" in _warnings(tmp_path / "ViT-B-16-openai.pt")


def test_timms_gelu_for_weights_trained_with_another_is_said(tmp_path: Path) -> None:
    theirs = randomize(timm.create_model("vit_base_patch32_clip_224.openai", depth=1, img_size=64, num_classes=5))
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    with pytest.warns(
        AssumptionWarning, match="computes GELU, as is done here, but its weights 'openai' were trained with Quick"
    ):
        ours = load_model(tmp_path)
    with torch.no_grad():
        assert_same(ours(images(64)), theirs(images(64)))


def test_norms_behind_the_branches_are_noticed(tmp_path: Path) -> None:
    """Parameters fit in names and shapes; their order in the file, or the file's name, tells."""
    state = VisionTransformer(**(TINY | {"block_fn": ResPostBlock})).state_dict()
    torch.save(state, tmp_path / "mine.pth")
    with pytest.raises(InputError, match="lists each block's norm1 after its attention"):
        load_model(tmp_path / "mine.pth", num_heads=4)
    save_file(state, tmp_path / "mine.safetensors")  # in alphabetical order, which says nothing
    assert "layer norms before the branches" in _warnings(tmp_path / "mine.safetensors", num_heads=4)
    save_file(state, tmp_path / "vit_base_patch16_rpn_224.safetensors")
    with pytest.raises(InputError, match="layer norms after the residual branches"):
        load_model(tmp_path / "vit_base_patch16_rpn_224.safetensors", num_heads=4)


def test_queries_normalised_over_all_heads_are_not_one_head(tmp_path: Path) -> None:
    change = {
        f"blocks.{layer}.attn.{part}_norm.{kind}": torch.ones(32)
        for layer in (0, 1)
        for part in "qk"
        for kind in ("weight", "bias")
    }
    with pytest.raises(InputError, match="normalised over all heads at once"):
        _load(tmp_path, change)
    _load(tmp_path, change, num_heads=1)


def test_every_parameter_matters(tmp_path: Path) -> None:
    """Changing any parameter changes the output, so the comparisons above notice one that is dropped, swapped or not loaded."""
    theirs = randomize(VisionTransformer(**(TINY | {"init_values": 1.0, "qk_norm": True, "reg_tokens": 2})))
    save_file(theirs.state_dict(), tmp_path / "all.safetensors")
    ours = load_model(tmp_path / "all.safetensors")
    with torch.no_grad():
        before = ours(images(48))
        for name, parameter in ours.named_parameters():
            kept = parameter.clone()
            parameter.add_(torch.from_numpy(np.random.default_rng(0).normal(size=parameter.shape)).float())
            # (A bias of the keys' norm adds the same to a query's scores for all keys; softmax does not see it.)
            assert name.endswith("k_norm.bias") or (ours(images(48)) - before).abs().max() > 1e-4, name
            parameter.copy_(kept)


def test_original_names_of_deit_iii_and_ibot(tmp_path: Path) -> None:
    theirs = randomize(VisionTransformer(**(TINY | {"init_values": 1e-5})))
    state = {re.sub(r"ls([12])\.gamma", r"gamma_\1", name): value for name, value in theirs.state_dict().items()}
    save_file(state | {"masked_embed": torch.zeros(1, 32)}, tmp_path / "deit.safetensors")
    ours = load_model(tmp_path / "deit.safetensors", num_heads=4)
    with torch.no_grad():
        assert_same(ours(images(48)), theirs(images(48)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"depth": 3},
        {"embed_dim": 64},
        {"patch_size": 16},
        {"qk_norm": True},
        {"reg_tokens": 4},
        {"mlp_ratio": 8},
        {"in_chans": 1},
        {"class_token": False},
        {"qkv_bias": False},
        {"pre_norm": True},
        {"init_values": 1e-5},
    ],
)
def test_arguments_that_contradict_the_weights(arguments: dict[str, Any]) -> None:
    from vit_probe.checkpoints.timm import from_state_dict

    state = VisionTransformer(**TINY).state_dict()
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 4, "mlp_ratio": 4.0, "depth": 2}}
    from_state_dict(state, {}, config)
    (name,) = arguments
    with pytest.raises(
        UnsupportedArchitecture, match=f"config.json has {name}=.*, which contradicts the shapes of the weights"
    ):
        from_state_dict(state, {}, config | {"model_args": {"num_heads": 4} | arguments})
