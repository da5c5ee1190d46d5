"""Files in Google's layout, loaded by us and by timm's own reader of the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from torch import nn

from tests.checkpoints.parity import assert_same, images, randomize
from vit_probe.checkpoints import load_model
from vit_probe.errors import InputError

timm = pytest.importorskip("timm")

from timm.models.vision_transformer import VisionTransformer  # noqa: E402

TINY: dict[str, Any] = {
    "img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 7, "dynamic_img_size": True
}  # fmt: skip


def google_arrays(model: nn.Module, *, big_vision: bool = False) -> dict[str, np.ndarray]:
    """The parameters of a timm model with the names, shapes and axis order of Google's JAX code.

    Dense kernels are (in, out), convolutions (row, col, in, out); query, key and value have kernels (dim, head, head_dim)
    and the output (head, head_dim, dim).
    """
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    heads = model.blocks[0].attn.num_heads  # type: ignore[index, union-attr]
    attention, mlp, second = (0, 0, 1) if big_vision else (1, 3, 2)
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        ("pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"): state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    if "cls_token" in state:
        arrays["cls"] = state["cls_token"]
    if "head.weight" in state:
        arrays |= {"head/kernel": state["head.weight"].T, "head/bias": state["head.bias"]}
    for layer in range(len(model.blocks)):  # type: ignore[arg-type]
        block, root = f"blocks.{layer}.", f"Transformer/encoderblock_{layer}/"
        for number, norm in ((0, "norm1"), (second, "norm2")):
            arrays[f"{root}LayerNorm_{number}/scale"] = state[f"{block}{norm}.weight"]
            arrays[f"{root}LayerNorm_{number}/bias"] = state[f"{block}{norm}.bias"]
        weights, biases = np.split(state[f"{block}attn.qkv.weight"], 3), np.split(state[f"{block}attn.qkv.bias"], 3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            path = f"{root}MultiHeadDotProductAttention_{attention}/{name}/"
            arrays[f"{path}kernel"] = weight.T.reshape(weight.shape[1], heads, -1)
            arrays[f"{path}bias"] = bias.reshape(heads, -1)
        projection = state[f"{block}attn.proj.weight"]
        out = f"{root}MultiHeadDotProductAttention_{attention}/out/"
        arrays[f"{out}kernel"] = projection.T.reshape(heads, -1, projection.shape[0])
        arrays[f"{out}bias"] = state[f"{block}attn.proj.bias"]
        for number in (0, 1):
            arrays[f"{root}MlpBlock_{mlp}/Dense_{number}/kernel"] = state[f"{block}mlp.fc{number + 1}.weight"].T
            arrays[f"{root}MlpBlock_{mlp}/Dense_{number}/bias"] = state[f"{block}mlp.fc{number + 1}.bias"]
    return arrays | _resnet_arrays(state)


def _resnet_arrays(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same for the ResNet: stages and units count from 1, and group norms have the shape (1, 1, 1, channel)."""
    arrays = {}
    for name, value in state.items():
        if not name.startswith("patch_embed.backbone."):
            continue
        *path, module, kind = name.removeprefix("patch_embed.backbone.").split(".")
        if path[-1:] == ["downsample"]:
            module += "_proj"
        elif path[:1] in ([], ["stem"]):
            module += "_root"
        root = f"block{int(path[1]) + 1}/unit{int(path[3]) + 1}/" if path[:1] == ["stages"] else ""
        if module.startswith("conv"):
            arrays[f"{root}{module}/kernel"] = value.transpose(2, 3, 1, 0)
        else:
            scale = {"weight": "scale", "bias": "bias"}[kind]
            arrays[f"{root}{module.replace('norm', 'gn')}/{scale}"] = value.reshape(1, 1, 1, -1)
    return arrays


def _check(path: Path, theirs: nn.Module, fresh: nn.Module, *sizes: tuple[int, int], **overrides: Any) -> None:
    """Our model and timm's `fresh` model, both loaded from the file, equal `theirs`, from which the file was written."""
    fresh.load_pretrained(str(path))  # type: ignore[operator]
    ours = load_model(path, **overrides)
    for size in sizes:
        with torch.no_grad():
            assert_same(fresh.eval()(images(*size)), theirs(images(*size)))
            assert_same(ours(images(*size)), theirs(images(*size)))


@pytest.mark.parametrize("root", ["", "params/", "opt/target/"])
def test_plain(root: str, tmp_path: Path) -> None:
    theirs = randomize(VisionTransformer(**TINY))
    np.savez(
        tmp_path / "vit.npz",
        **{root + name: array for name, array in google_arrays(theirs, big_vision=root == "params/").items()},
    )
    _check(tmp_path / "vit.npz", theirs, VisionTransformer(**TINY), (48, 48), (40, 72))


def test_configuration_from_shapes(tmp_path: Path) -> None:
    theirs = randomize(VisionTransformer(**(TINY | {"num_heads": 8, "patch_size": (8, 6), "depth": 3, "mlp_ratio": 2.5})))
    np.savez(tmp_path / "ViT.npz", **google_arrays(theirs))
    ours = load_model(tmp_path / "ViT.npz", image_size=48)
    config = ours.config
    assert (config.num_heads, config.patch_size, config.depth, config.mlp_ratio, config.embed_dim) == (8, (8, 6), 3, 2.5, 32)
    assert (config.num_classes, config.image_size, ours.name) == (7, (48, 48), "ViT.npz")
    preprocessing = ours.preprocessing
    assert preprocessing is not None
    assert (preprocessing.size, preprocessing.resize, preprocessing.mean, preprocessing.std) == (
        (48, 48),
        55,
        (0.5,) * 3,
        (0.5,) * 3,
    )
    with torch.no_grad():
        assert_same(ours(images(48)), theirs(images(48)))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    "variant", [{"no_embed_class": True}, {"class_token": False, "global_pool": "avg", "fc_norm": False}], ids=["token", "gap"]
)
def test_big_vision(variant: dict[str, Any], stacked: bool, tmp_path: Path) -> None:
    """In big_vision the class token has no position embedding, and layers may be stacked along a first axis."""
    theirs = randomize(VisionTransformer(**(TINY | variant)))
    arrays = google_arrays(theirs, big_vision=True)
    if stacked:
        first = "Transformer/encoderblock_0/"
        tails = [name.removeprefix(first) for name in arrays if name.startswith(first)]
        layers = {
            f"Transformer/encoderblock/{tail}": [f"Transformer/encoderblock_{layer}/{tail}" for layer in range(2)]
            for tail in tails
        }
        arrays |= {name: np.stack([arrays.pop(part) for part in parts]) for name, parts in layers.items()}
    np.savez(tmp_path / "big.npz", **{f"params/{name}": array for name, array in arrays.items()})
    _check(tmp_path / "big.npz", theirs, VisionTransformer(**(TINY | variant)), (48, 48), (64, 64))
    np.savez(tmp_path / "image.npz", **{f"img/{name}": array for name, array in arrays.items()}, temperature=np.ones(1))
    with torch.no_grad():
        assert_same(load_model(tmp_path / "image.npz")(images(48)), theirs(images(48)))


@pytest.mark.parametrize(
    ("name", "layers"),
    [("vit_small_r26_s32_224", (2, 2, 2, 2)), ("vit_base_r50_s16_224", (3, 4, 9)), ("vit_tiny_r_s16_p8_224", ())],
)
def test_hybrid(name: str, layers: tuple[int, ...], tmp_path: Path) -> None:
    arguments = {"img_size": 96, "depth": 1, "num_classes": 7, "dynamic_img_size": True}
    theirs = randomize(timm.create_model(name, **arguments))
    arrays = google_arrays(theirs)
    assert {"conv_root/kernel", "gn_root/scale"} <= set(arrays)
    assert ("block1/unit1/conv_proj/kernel" in arrays) == bool(layers)
    np.savez(tmp_path / "hybrid.npz", **arrays)
    _check(tmp_path / "hybrid.npz", theirs, timm.create_model(name, **arguments), (96, 96), (64, 128))
    stem = load_model(tmp_path / "hybrid.npz").config.stem
    assert stem is not None
    assert (stem.layers, stem.width) == (layers, 64)


def test_pre_logits_can_be_left_out(tmp_path: Path) -> None:
    theirs = randomize(VisionTransformer(**TINY))
    arrays = google_arrays(theirs) | {
        "pre_logits/kernel": np.ones((32, 32), np.float32),
        "pre_logits/bias": np.ones(32, np.float32),
    }
    np.savez(tmp_path / "21k.npz", **arrays)
    with pytest.raises(InputError, match=r"a hidden layer before the head \(pre_logits\).*pass num_classes=0"):
        load_model(tmp_path / "21k.npz")
    theirs.reset_classifier(0)  # type: ignore[operator]
    with torch.no_grad():
        assert_same(load_model(tmp_path / "21k.npz", num_classes=0)(images(48)), theirs(images(48)))


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    arrays = google_arrays(randomize(VisionTransformer(**TINY)))

    def load(changes: dict[str, Any], remove: str = "(none)", **overrides: Any) -> None:
        np.savez(tmp_path / "changed.npz", **{name: array for name, array in (arrays | changes).items() if name != remove})
        load_model(tmp_path / "changed.npz", **overrides)

    with pytest.raises(InputError, match=r"no embedding/kernel\); its first arrays are embedding/bias, Transformer/posembed"):
        load({}, "embedding/kernel")
    with pytest.raises(InputError, match=r"an attention-pooling head \(MAPHead_0\), which VisionTransformer does not support$"):
        load({"MAPHead_0/probe": np.zeros((1, 1, 32), np.float32)})
    with pytest.raises(InputError, match=r"missing: blocks\.1\.mlp\.fc1\.bias$"):
        load({}, "Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias")
    with pytest.raises(
        InputError, match=r"missing: blocks\.1\.attn\.qkv\.weight; unexpected: blocks\.1\.attn\.query\.weight, "
    ):
        load({}, "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/kernel")
    with pytest.raises(InputError, match=r"head\.weight \(7, 32\) instead of \(9, 32\)"):
        load({}, num_classes=9)
    with pytest.raises(InputError, match=r"the array cls of the \.npz file holds int64"):
        load({"cls": np.zeros((1, 1, 32), np.int64)})
    with pytest.raises(InputError, match=r"something other than plain arrays, which is never loaded"):
        load({"cls": np.array([{"a": 1}], dtype=object)})


@pytest.mark.parametrize("value", [np.float32(1), np.zeros(0, np.float32), np.zeros((0, 4, 8), np.float32), np.array(["a"])])
@pytest.mark.parametrize("part", ["query/kernel", "out/kernel", "LayerNorm_0/scale"])
def test_hostile_arrays(part: str, value: Any, tmp_path: Path) -> None:
    arrays = google_arrays(randomize(VisionTransformer(**TINY)))
    name = next(name for name in arrays if name.endswith(part))
    np.savez(tmp_path / "vit.npz", **(arrays | {name: value}))
    with pytest.raises(InputError):
        load_model(tmp_path / "vit.npz")


def test_more_stacked_layers_than_channels(tmp_path: Path) -> None:
    arrays = {name: array for name, array in google_arrays(VisionTransformer(**TINY)).items() if "encoderblock" not in name}
    arrays["Transformer/encoderblock/LayerNorm_0/scale"] = np.zeros((3_000_000, 1), np.float32)
    np.savez_compressed(tmp_path / "vit.npz", **arrays)
    with pytest.raises(InputError, match=r"LayerNorm_0/scale of the \.npz file holds 3000000 layers of 1 numbers"):
        load_model(tmp_path / "vit.npz")


def test_members_that_are_no_arrays(tmp_path: Path) -> None:
    with ZipFile(tmp_path / "vit.npz", "w") as archive:
        archive.writestr("embedding/kernel.npy", "text")
    with pytest.raises(InputError, match="holds something other than arrays: embedding/kernel"):
        load_model(tmp_path / "vit.npz")
