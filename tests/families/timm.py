"""timm's families, and their attention with `fused_attn = False`."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import HybridEmbed, StdConv2dSame, set_fused_attn
from timm.models.resnetv2 import ResNetV2
from timm.models.swin_transformer import SwinTransformer, window_partition
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from timm.models.vision_transformer_sam import window_partition as sam_window_partition
from torch import Tensor, nn

from tests.example_models import output
from tests.families.family import Family, Size, Unfused, WindowLayout, blocks, patch_indices, patch_numbers

TINY: dict[str, Any] = dict(embed_dim=32, depth=2, num_heads=2, num_classes=5)


def unfused(model: nn.Module, images: Tensor, layers: tuple[str, ...]) -> Unfused:
    """timm's own softmax weights, which are the input of its attention dropout."""
    model, maps = copy.deepcopy(model), {}
    for name, module in model.named_modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if name in layers:
            module.attn_drop.register_forward_pre_hook(_record_weights(maps, name, module.num_heads))
    return Unfused(maps, output(model(images)))


def _record_weights(maps: dict[str, Tensor], name: str, heads: int) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        maps[name] = args[0].unflatten(0, (-1, heads)) if args[0].ndim == 3 else args[0]  # SAM folds heads into the batch

    return hook


def _named(name: str, **options: Any) -> Any:
    """Return a function that builds a small version of timm's model of this name."""
    return lambda size: timm.create_model(name, img_size=size, **(TINY | dict(patch_size=8) | options))


def _hybrid(size: Size) -> nn.Module:
    """Like `vit_base_r50_s16_224`, with fewer and narrower stages."""
    stem = ResNetV2(
        layers=(1, 1), channels=(128, 256), stem_chs=32, num_classes=0, global_pool="", preact=False, stem_type="same",
        conv_layer=partial(StdConv2dSame, eps=1e-8),
    )  # fmt: skip
    return VisionTransformer(img_size=size, patch_size=1, embed_layer=partial(HybridEmbed, backbone=stem), **TINY)


def sam(size: Size) -> VisionTransformerSAM:
    """Windows of 3 x 3 patches, except in the second layer; relative positions."""
    return VisionTransformerSAM(
        img_size=size, patch_size=8, window_size=3, global_attn_indexes=(1,), use_rel_pos=True, neck_chans=16,
        **(TINY | dict(depth=3)),
    )  # fmt: skip


def swin(size: Size, **options: Any) -> SwinTransformer:
    """Windows of 3 x 3 patches, shifted in every second layer; patches are merged after two."""
    set_fused_attn(True, experimental=True)
    try:
        defaults = dict(
            img_size=size, patch_size=4, window_size=3, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=5
        )
        return SwinTransformer(**(defaults | options))
    finally:
        set_fused_attn(True)


def _sam_windows(model: VisionTransformerSAM, size: Size) -> dict[int, WindowLayout]:
    rows, cols = size[0] // 8, size[1] // 8
    return {
        layer: WindowLayout(
            rows, cols, (8, 8), patch_indices(sam_window_partition(patch_numbers(rows, cols), block.window_size)[0])
        )
        for layer, block in enumerate(model.blocks)
        if block.window_size
    }


def _swin_windows(model: SwinTransformer, size: Size) -> dict[int, WindowLayout]:
    layouts = {}
    for stage, layer in enumerate(model.layers):
        patch = 4 * 2**stage
        rows, cols = -(-size[0] // patch), -(-size[1] // patch)
        for block in layer.blocks:
            (down, right), (height, width) = block.shift_size, block.window_size
            shifted = torch.roll(patch_numbers(rows, cols), (-down, -right), (1, 2))
            padded = nn.functional.pad(shifted, (0, 0, 0, -cols % width, 0, -rows % height))
            masked = None if block.attn_mask is None else block.attn_mask < -50
            patches = patch_indices(window_partition(padded, block.window_size))
            layouts[len(layouts)] = WindowLayout(rows, cols, (patch, patch), patches, masked)
    return layouts


_BLOCKS = blocks("blocks.{}.attn")
_SIZES = ((32, 48), (40, 24), (48, 48))
_timm = partial(Family, "timm", unfused=unfused, layers=_BLOCKS, sizes=_SIZES)

FAMILIES = [
    _timm("ViT", _named("vit_tiny_patch16_224")),
    _timm("DeiT, distilled", _named("deit_tiny_distilled_patch16_224"), num_prefix_tokens=2),
    _timm("BEiT", _named("beit_base_patch16_224")),
    _timm("DINOv2 with registers", _named("vit_giant_patch14_reg4_dinov2"), num_prefix_tokens=5),
    _timm("DINOv3", _named("vit_small_patch16_dinov3"), num_prefix_tokens=5),
    _timm("EVA-02", _named("eva02_tiny_patch14_224", ref_feat_shape=(4, 6))),
    _timm("ViT, mixed RoPE", _named("vit_small_patch16_rope_mixed_224")),
    _timm(
        "Perception Encoder",
        _named("vit_pe_core_tiny_patch16_384", attn_pool_num_heads=2, ref_feat_shape=(4, 6)),
        skipped={"attn_pool": "1 query for {tokens} keys"},
    ),
    _timm(
        "SigLIP",
        _named("vit_base_patch16_siglip_224"),
        num_prefix_tokens=0,
        has_cls_token=False,
        skipped={"attn_pool": "1 query for {tokens} keys"},
    ),
    _timm("CLIP", _named("vit_base_patch16_clip_224")),
    _timm("hybrid ResNet + ViT", _hybrid),
    _timm(
        "SAM",
        sam,
        layers=blocks("blocks.{}.attn", 3),
        sizes=((40, 56), (48, 72), (24, 32)),
        num_prefix_tokens=0,
        has_cls_token=False,
        windows=_sam_windows,
    ),
    _timm(
        "Swin",
        swin,
        layers=(*blocks("layers.0.blocks.{}.attn"), *blocks("layers.1.blocks.{}.attn")),
        sizes=((28, 44), (48, 48), (24, 40)),
        patch_size=(4, 4),
        num_prefix_tokens=0,
        has_cls_token=False,
        windows=_swin_windows,
    ),
]
