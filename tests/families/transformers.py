"""transformers' families, and their attention with `attn_implementation="eager"`."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.models.swin.modeling_swin import window_partition

from tests.example_models import output, transformers_vit
from tests.families.family import Family, Size, Unfused, WindowLayout, blocks, patch_indices, patch_numbers


def unfused(model: nn.Module, images: Tensor, layers: tuple[str, ...]) -> Unfused:
    """The attention weights that the layers of the same model return in the eager implementation."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    eager, maps = type(model)(config).eval(), {}
    eager.load_state_dict(model.state_dict())
    for name in layers:
        eager.get_submodule(name).register_forward_hook(_record_weights(maps, name, config.num_attention_heads))
    return Unfused(maps, output(eager(images, **getattr(model.forward, "keywords", {}))))


def _record_weights(maps: dict[str, Tensor], name: str, heads: Any) -> Any:
    def hook(module: nn.Module, args: Any, result: tuple[Tensor, Tensor]) -> None:
        weights = result[1]
        maps[name] = weights.unflatten(0, (-1, heads)) if weights.ndim == 3 else weights  # SAM folds heads into the batch

    return hook


def _built_for_each_size(name: str, **options: Any) -> Any:
    """Return a function that builds a model for images of each size."""
    return lambda size: transformers_vit(name, image_size=size, **options)


def _built_for_size_32(name: str, **options: Any) -> Any:
    """Return a function that always builds a model for 32 x 32 pixels; the library itself adapts it to other sizes."""
    return lambda size: transformers_vit(name, image_size=32, **options)


def _interpolating(name: str) -> Any:
    """Return a function that builds a model for 32 x 32 pixels and interpolates its position table for other sizes."""

    def build(size: Size) -> nn.Module:
        model = transformers_vit(name, image_size=32)
        if size != (32, 32):
            model.forward = partial(model.forward, interpolate_pos_encoding=True)
        return model

    return build


def _sam(size: Size) -> nn.Module:
    """Windows of 3 x 3 patches, except in the second layer."""
    return transformers_vit(
        "SamVision",
        image_size=size[0],
        num_hidden_layers=3,
        window_size=3,
        global_attn_indexes=[1],
        output_channels=16,
        mlp_dim=64,
    )


def _swin(size: Size) -> nn.Module:
    """Windows of 3 x 3 patches, shifted in every second layer; patches are merged after two."""
    config = transformers.SwinConfig(
        image_size=size, patch_size=4, window_size=3, embed_dim=16, depths=[2, 2], num_heads=[2, 4]
    )
    return transformers.SwinModel(config).eval()


def _sam_windows(model: Any, size: Size) -> dict[int, WindowLayout]:
    rows, cols = size[0] // 8, size[1] // 8
    return {
        index: WindowLayout(
            rows, cols, (8, 8), patch_indices(layer.window_partition(patch_numbers(rows, cols), layer.window_size)[0])
        )
        for index, layer in enumerate(model.vision_encoder.layers)
        if layer.window_size
    }


def _swin_windows(model: Any, size: Size) -> dict[int, WindowLayout]:
    layouts = {}
    for stage, module in enumerate(model.encoder.layers):
        patch = 4 * 2**stage
        rows, cols = -(-size[0] // patch), -(-size[1] // patch)
        for layer in module.blocks:
            layer.set_shift_and_window_size((rows, cols))
            padded, _ = layer.maybe_pad(patch_numbers(rows, cols), rows, cols)
            mask = layer.get_attn_mask(*padded.shape[1:3], padded.dtype, padded.device)
            patches = patch_indices(window_partition(layer.cyclic_shift(padded), layer.window_size))
            layouts[len(layouts)] = WindowLayout(rows, cols, (patch, patch), patches, None if mask is None else mask < -50)
    return layouts


_SIZES = ((32, 48), (40, 24), (48, 48))
_family = partial(Family, "transformers", unfused=unfused, sizes=_SIZES)
_VIT, _DINO, _CLIP = (
    blocks(path) for path in ("layers.{}.attention", "encoder.layer.{}.attention", "encoder.layers.{}.self_attn")
)

FAMILIES = [
    _family("ViT", _built_for_each_size("ViT"), layers=_VIT),
    _family("DeiT", _built_for_each_size("DeiT"), layers=_VIT, num_prefix_tokens=2),
    _family("DINOv2", _built_for_size_32("Dinov2"), layers=_DINO),
    _family(
        "DINOv2 with registers",
        _built_for_size_32("Dinov2WithRegisters", num_register_tokens=4, use_swiglu_ffn=True),
        layers=_DINO,
        num_prefix_tokens=5,
    ),
    _family(
        "DINOv3",
        _built_for_size_32("DINOv3ViT", num_register_tokens=4),
        layers=blocks("model.layer.{}.attention"),
        num_prefix_tokens=5,
    ),
    _family("CLIP", _interpolating("CLIPVision"), layers=_CLIP),
    _family(
        "SigLIP",
        _interpolating("SiglipVision"),
        layers=_CLIP,
        num_prefix_tokens=0,
        has_cls_token=False,
        skipped={"head.attention": "1 query for {tokens} keys"},
    ),
    _family("BEiT", _built_for_each_size("Beit", use_relative_position_bias=True), layers=_VIT),
    _family("I-JEPA", _built_for_each_size("IJepa"), layers=_VIT, num_prefix_tokens=0, has_cls_token=False),
    _family(
        "SAM",
        _sam,
        layers=blocks("vision_encoder.layers.{}.attn", 3),
        sizes=((40, 40), (48, 48)),
        num_prefix_tokens=0,
        has_cls_token=False,
        windows=_sam_windows,
    ),
    _family(
        "Swin",
        _swin,
        layers=(*blocks("encoder.layers.0.blocks.{}.attention"), *blocks("encoder.layers.1.blocks.{}.attention")),
        sizes=((28, 44), (48, 48), (24, 40)),
        patch_size=(4, 4),
        num_prefix_tokens=0,
        has_cls_token=False,
        windows=_swin_windows,
    ),
]
