"""Small models of every family with weights that matter, and two independent views of their attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests import reference
from tests.checkpoints.parity import randomize
from vit_probe import AttentionTile, TokenGrid, VisionTransformer, ViTConfig


def small_vit(**options) -> VisionTransformer:
    """Our own model: 2 layers of 2 heads on 3 x 4 patches of 8 x 6 pixels, unless told otherwise."""
    config = dict(image_size=(24, 24), patch_size=(8, 6), embed_dim=16, depth=2, num_heads=2, num_classes=3)
    model = VisionTransformer(ViTConfig(**(config | options)))
    randomize(model)
    return model


def classifier(depth: int) -> VisionTransformer:
    """Our own model as photographs of 32 pixels need it, its attention far from uniform."""
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(image_size=32, patch_size=8, embed_dim=48, depth=depth, num_heads=4, num_classes=5))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 10
    return model


def images(height: int = 24, width: int = 24, *, batch: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Family:
    """How a library builds a model, what it is shown, and where its tokens then lie."""

    build: Callable[[], nn.Module]
    size: tuple[int, int]
    grid: TokenGrid
    layers: tuple[str, ...]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return randomize(self.build())

    def images(self, batch: int = 3) -> Tensor:
        return images(*self.size, batch=batch)


def _timm(**options) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    return TimmViT(**(dict(img_size=(32, 48), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5) | options))


def _eva(**options) -> nn.Module:
    from timm.models.eva import Eva

    size = dict(img_size=(32, 48), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, use_rot_pos_emb=True)
    return Eva(**(size | options))


def _beit() -> nn.Module:
    from timm.models.beit import Beit

    return Beit(
        img_size=(32, 48),
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=5,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
    )


def transformers_vit(name: str, **options) -> nn.Module:
    import transformers

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=8)
    config = getattr(transformers, f"{name}Config")(**(sizes | dict(image_size=(32, 48)) | options))
    return getattr(transformers, f"{name}Model")(config).eval()


def _torchvision() -> nn.Module:
    from torchvision.models import VisionTransformer as TorchvisionViT

    model = TorchvisionViT(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    return model


class Encoder(nn.Module):
    """`nn.TransformerEncoder` over patches, with its inference fast path."""

    def __init__(self, *, norm_first: bool = False) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 32, 8, 8)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(self.proj(images).flatten(2).mT)


def swin() -> nn.Module:
    """transformers' Swin on 48 x 48 pixels: 16 windows of 3 x 3 tokens and then 4, every other layer's shifted and masked."""
    from transformers import SwinConfig, SwinModel

    torch.manual_seed(0)
    sizes = dict(image_size=48, patch_size=4, window_size=3, embed_dim=16, depths=[2, 2], num_heads=[1, 2])
    return randomize(SwinModel(SwinConfig(**sizes)).eval())


def _grid(prefix: int, cls: bool, rows: int = 4, cols: int = 6) -> TokenGrid:
    return TokenGrid(rows, cols, (8, 8), prefix, cls)


_BLOCKS = ("blocks.0.attn", "blocks.1.attn")
_HF = ("layers.0.attention", "layers.1.attention")
FAMILIES = {
    "ours": Family(lambda: small_vit(num_registers=2), (24, 24), TokenGrid(3, 4, (8, 6), 3, True), _BLOCKS),
    "timm": Family(_timm, (32, 48), _grid(1, True), _BLOCKS),
    "timm-registers": Family(lambda: _timm(reg_tokens=3, qk_norm=True), (32, 48), _grid(4, True), _BLOCKS),
    "timm-gap": Family(lambda: _timm(class_token=False, global_pool="avg"), (32, 48), _grid(0, False), _BLOCKS),
    "timm-eva02": Family(_eva, (32, 48), _grid(1, True), _BLOCKS),
    "timm-dinov3": Family(
        lambda: _eva(num_reg_tokens=2, use_abs_pos_emb=False, rope_type="dinov3", qkv_fused=True),
        (32, 48),
        _grid(3, True),
        _BLOCKS,
    ),
    "timm-beit": Family(_beit, (32, 48), _grid(1, True), _BLOCKS),
    "transformers-vit": Family(lambda: transformers_vit("ViT"), (32, 48), _grid(1, True), _HF),
    "transformers-dinov2": Family(lambda: transformers_vit("Dinov2", image_size=32), (32, 48), _grid(1, True), _HF),
    "transformers-registers": Family(
        lambda: transformers_vit("Dinov2WithRegisters", image_size=32, num_register_tokens=2), (32, 48), _grid(3, True), _HF
    ),
    "transformers-siglip": Family(
        lambda: transformers_vit("SiglipVision", image_size=32), (32, 32), _grid(0, False, 4, 4), _HF
    ),
    "torchvision": Family(_torchvision, (32, 32), _grid(1, True, 4, 4), _HF),
    "encoder": Family(Encoder, (32, 48), _grid(0, False), _HF),
}


class Assemble:
    """An observer that keeps everything: each layer's (batch, head, query, key), and every tile's extent."""

    def __init__(self) -> None:
        self.layers: dict[int, np.ndarray] = {}
        self.names: dict[int, str] = {}
        self.tiles: list[AttentionTile] = []

    def update(self, tile: AttentionTile) -> None:
        shape = (tile.images.stop, tile.num_heads, tile.num_tokens, tile.num_tokens)
        before = self.layers.get(tile.layer)
        if before is None or len(before) < tile.images.stop:
            self.layers[tile.layer] = np.full(shape, np.nan)
            if before is not None:
                self.layers[tile.layer][: len(before)] = before
        self.layers[tile.layer][tile.images, tile.heads, tile.queries] = tile.probabilities.double().numpy()
        self.names[tile.layer] = tile.name
        self.tiles.append(tile)

    def attention(self) -> np.ndarray:
        """(layer, batch, head, query, key); NaN where no tile came."""
        return np.stack([self.layers[layer] for layer in sorted(self.layers)])


def expected_attention(model: nn.Module, *inputs: Tensor) -> np.ndarray:
    """(layer, batch, head, query, key) from the q, k that the model hands to its fused attention, by the slow reference."""
    fused = F.scaled_dot_product_attention
    maps = []

    def record(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if query.shape[-2] == key.shape[-2]:
            bias = None if attn_mask is None else attn_mask.double().numpy()
            scale_ = query.shape[-1] ** -0.5 if scale is None else scale
            maps.append(reference.softmax_attention(query.double().numpy(), key.double().numpy(), scale_, bias))
        return fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention", record):
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return np.stack(maps)


class Largest(TorchDispatchMode):
    """The size in bytes of the largest tensor that any operation makes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


def output(value: object) -> Tensor:
    """The tensor in a model's output."""
    return value if isinstance(value, Tensor) else value.last_hidden_state  # type: ignore[attr-defined]


def branches_side_by_side() -> nn.Module:
    """timm's blocks of two attentions whose outputs are added up: neither is what passes on."""
    from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer

    torch.manual_seed(0)
    sizes = dict(img_size=24, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    return VisionTransformer(**sizes, block_fn=ParallelThingsBlock).eval()


class Hungry(nn.Module):
    """Memory holds so many images at once; the others are refused after the first layer."""

    def __init__(self, most: int, error: BaseException | None = None) -> None:
        super().__init__()
        self.inner, self.most = small_vit(), most
        self.error = error or torch.OutOfMemoryError("out of memory")
        self.inner.blocks[1].register_forward_pre_hook(self._weigh)
        self.sizes: list[int] = []

    def _weigh(self, module: nn.Module, args: tuple[Tensor]) -> None:
        if len(args[0]) > self.most:
            raise self.error

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return self.inner(x)
