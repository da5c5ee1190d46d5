"""Reading Google's `.npz` checkpoints: vision_transformer (plain and hybrid) and big_vision."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit_probe.checkpoints.checkpoint import Checkpoint
from vit_probe.checkpoints.renaming import concatenate_parameters, rename_parameters
from vit_probe.checkpoints.shapes import config_from_shapes
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.errors import InputError
from vit_probe.models.config import as_pair

__all__ = ["from_arrays"]

_ROOTS = ("opt/target/", "params/img/", "params/", "img/", "")

# big_vision numbers sub-modules of each type from 0, vision_transformer by their place in the block: LayerNorm_0, LayerNorm_2.
_BLOCK = r"^Transformer/encoderblock_(\d+)/"
_NAMES = (
    (r"^embedding/", "patch_embed.proj."),
    (r"^cls$", "cls_token"),
    (r"^(Transformer/posembed_input/)?pos_embedding$", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm."),
    (r"^head/", "head."),
    (rf"{_BLOCK}LayerNorm_0/", r"blocks.\1.norm1."),
    (rf"{_BLOCK}LayerNorm_[12]/", r"blocks.\1.norm2."),
    (rf"{_BLOCK}MultiHeadDotProductAttention_[01]/out/", r"blocks.\1.attn.proj."),
    (rf"{_BLOCK}MultiHeadDotProductAttention_[01]/(query|key|value)/", r"blocks.\1.attn.\2."),
    (rf"{_BLOCK}MlpBlock_[03]/Dense_0/", r"blocks.\1.mlp.fc1."),
    (rf"{_BLOCK}MlpBlock_[03]/Dense_1/", r"blocks.\1.mlp.fc2."),
    (r"^conv_root/", "patch_embed.backbone.stem.conv."),
    (r"^gn_root/", "patch_embed.backbone.stem.norm."),
    (r"^block(\d+)/unit(\d+)/conv_proj/", r"patch_embed.backbone.stages.\1.blocks.\2.downsample.conv."),
    (r"^block(\d+)/unit(\d+)/gn_proj/", r"patch_embed.backbone.stages.\1.blocks.\2.downsample.norm."),
    (r"^block(\d+)/unit(\d+)/conv(\d)/", r"patch_embed.backbone.stages.\1.blocks.\2.conv\3."),
    (r"^block(\d+)/unit(\d+)/gn(\d)/", r"patch_embed.backbone.stages.\1.blocks.\2.norm\3."),
    (r"\.(kernel|scale)$", ".weight"),
)


def from_arrays(arrays: Mapping[str, np.ndarray], overrides: Mapping[str, Any]) -> Checkpoint:
    """Convert arrays under Google's names to a `Checkpoint`.

    Google's kernels have the input axis first; query, key and value each have a kernel of shape (dim, head, head_dim).

    Images are prepared as in the papers' evaluation: the shorter side resized to 256/224 of the image size, a centre crop,
    values from -1 to 1. The original code uses the tanh approximation of GELU; like timm's copies of these weights, the model
    here uses the exact function.

    Args:
        arrays: Content of the `.npz` file, with or without a prefix (`params/`, `img/`, `opt/target/`); layers separate or
            stacked.
        overrides: Fields of `ViTConfig` given by the user. `num_classes=0` leaves out the head and the hidden layer before it.

    Raises:
        InputError: If the file holds another kind of model, or the model has parts that `VisionTransformer` does not have.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929; Steiner et al. 2022, arXiv:2106.10270.
    """
    root = next((root for root in _ROOTS if f"{root}embedding/kernel" in arrays), None)
    if root is None:
        raise InputError(
            "the .npz file is not a Vision Transformer in Google's layout (it has no embedding/kernel); "
            f"its first arrays are {', '.join(list(arrays)[:3]) or 'none'}"
        )
    arrays = _unstack({name.removeprefix(root): array for name, array in arrays.items() if name.startswith(root)})
    if overrides.get("num_classes") == 0:
        arrays = {name: array for name, array in arrays.items() if not name.startswith(("pre_logits/", "head/"))}
    for prefix, part in (("pre_logits/", "a hidden layer before the head"), ("MAPHead_0/", "an attention-pooling head")):
        if any(name.startswith(prefix) for name in arrays):
            advice = "; pass num_classes=0 to load the model without its head" if prefix == "pre_logits/" else ""
            raise InputError(f"the checkpoint has {part} ({prefix[:-1]}), which VisionTransformer does not support{advice}")
    known: dict[str, Any] = {}
    query = next((array for name, array in arrays.items() if name.endswith("/query/kernel")), None)
    if query is not None and query.ndim == 3:
        known["num_heads"] = query.shape[1]
    tensors = {_count_from_zero(name): _to_tensor(name, array) for name, array in arrays.items()}
    state = concatenate_parameters(rename_parameters(tensors, _NAMES), ("query", "key", "value"), "qkv")
    config = config_from_shapes(state, known | dict(overrides), certain=("activation", "norm_eps", "pooling"))
    size = as_pair(config.image_size, "image_size")
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing.imagenet(size, mean=half, std=half, interpolation="bilinear")
    return Checkpoint(config, state, preprocessing)


def _unstack(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Split layers that are stacked along a first axis, as by big_vision's scan over layers."""
    unstacked: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if name.startswith("Transformer/encoderblock/"):
            tail = name.removeprefix("Transformer/encoderblock/")
            if len(array) > array[0].size:  # a layer has at least as many channels as there are layers in any model
                raise InputError(f"the array {name} of the .npz file holds {len(array)} layers of {array[0].size} numbers")
            unstacked |= {f"Transformer/encoderblock_{layer}/{tail}": array[layer] for layer in range(len(array))}
        else:
            unstacked[name] = array
    return unstacked


def _count_from_zero(name: str) -> str:
    """Renumber the stages and units of a ResNet, which Google counts from 1."""
    return re.sub(r"^block(\d+)/unit(\d+)/", lambda match: f"block{int(match[1]) - 1}/unit{int(match[2]) - 1}/", name)


def _to_tensor(name: str, array: np.ndarray) -> Tensor:
    """Convert an array to PyTorch's order of axes: outputs first."""
    if array.dtype.kind != "f":
        raise InputError(f"the array {name} of the .npz file holds {array.dtype} instead of floating-point numbers")
    if "MultiHeadDotProductAttention" in name:
        # Kernels (dim, head, head_dim), or (head, head_dim, dim) for the output projection; biases (head, head_dim).
        outputs = array.shape[-1] if "/out/" in name else array.size // array.shape[0]
        array = array.reshape(-1, outputs).T if name.endswith("/kernel") else array.reshape(-1)
    elif array.ndim == 4 and name.endswith("/kernel"):
        array = array.transpose(3, 2, 0, 1)
    elif array.ndim == 4:  # group norms in the first published files have the shape (1, 1, 1, channel)
        array = array.reshape(-1)
    elif name.endswith("/kernel"):
        array = array.T
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
