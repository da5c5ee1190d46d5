"""One set of random weights in three libraries: our own `VisionTransformer`, timm's and transformers'."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.operators import define_torchvision_operators
from vit_probe import TokenGrid, VisionTransformer, ViTConfig

__all__ = ["Setting"]

_EPS = 1e-6
_TRANSFORMERS_NAMES = (
    (r"^(cls_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "layers."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.", ".attention."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"^norm\.", "layernorm."),
)


@dataclass(frozen=True)
class Setting:
    """A case on a device: the images, and each library's model, which is built on first access.

    Args:
        case: Sizes of the model and the images.
        device: Where to run.
        dtype: Type of the weights and the images.
    """

    case: Case
    device: torch.device
    dtype: torch.dtype

    @property
    def grid(self) -> TokenGrid:
        """Where the patches lie."""
        case = self.case
        return TokenGrid(case.side, case.side, (case.patch_size, case.patch_size), 1, True)

    @cached_property
    def images(self) -> Float[Tensor, "image channel height width"]:
        """Random images, in float32 on the CPU."""
        size = self.case.image_size
        return torch.randn(self.case.images, 3, size, size, generator=torch.Generator().manual_seed(1))

    @cached_property
    def batches(self) -> tuple[Tensor, ...]:
        """The images as input of the models, in batches."""
        return self.images.to(self.device, self.dtype).split(self.case.batch_size)

    def load(self, model: str) -> Any:
        """The model of this name, with the images ready."""
        assert self.batches
        return getattr(self, model)

    @cached_property
    def own(self) -> VisionTransformer:
        """Our own model."""
        case = self.case
        config = ViTConfig(
            image_size=case.image_size,
            patch_size=case.patch_size,
            embed_dim=case.embed_dim,
            depth=case.depth,
            num_heads=case.num_heads,
            num_classes=0,
            norm_eps=_EPS,
        )
        model = VisionTransformer(config)
        _randomize(model)
        return model.to(self.device, self.dtype).eval()

    @cached_property
    def timm_fused(self) -> Any:
        """timm's model with default options."""
        return self._timm()

    @cached_property
    def timm_unfused(self) -> Any:
        """timm's model with the fused attention of every layer switched off, so that its modules compute the attention."""
        model = self._timm()
        for block in model.blocks:
            block.attn.fused_attn = False
        return model

    @cached_property
    def transformers_sdpa(self) -> Any:
        """transformers' model with fused attention, its default."""
        return self._transformers("sdpa")

    @cached_property
    def transformers_eager(self) -> Any:
        """transformers' model with eager attention, which can return its weights."""
        return self._transformers("eager")

    def _timm(self) -> Any:
        define_torchvision_operators()
        from timm.models.vision_transformer import VisionTransformer as TimmViT

        case = self.case
        with torch.device("meta"):
            model = TimmViT(
                img_size=case.image_size,
                patch_size=case.patch_size,
                embed_dim=case.embed_dim,
                depth=case.depth,
                num_heads=case.num_heads,
                num_classes=0,
            )
        model.load_state_dict(self.own.state_dict(), assign=True)
        return model.eval()

    def _transformers(self, attention: str) -> Any:
        define_torchvision_operators()
        from transformers import ViTConfig as TransformersConfig
        from transformers import ViTModel

        case = self.case
        options: dict[str, Any] = dict(
            hidden_size=case.embed_dim,
            num_hidden_layers=case.depth,
            num_attention_heads=case.num_heads,
            intermediate_size=4 * case.embed_dim,
            image_size=case.image_size,
            patch_size=case.patch_size,
            layer_norm_eps=_EPS,
            attn_implementation=attention,
        )
        with torch.device("meta"):
            model: Any = ViTModel(TransformersConfig(**options), add_pooling_layer=False)
        model.load_state_dict(dict(_transformers_state(self.own.state_dict())), assign=True)
        return model.eval()


def _randomize(model: VisionTransformer) -> None:
    """Set weights with which attention is far from uniform (logits deviate by about 2), and leaving out any parameter shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + (0 if name.endswith("bias") else 1))
            elif name in ("cls_token", "pos_embed"):
                parameter.copy_(0.5 * noise)
            else:
                gain = 2.0 if "qkv" in name else 1.0
                parameter.copy_(noise * (gain / parameter[0].numel()) ** 0.5)


def _transformers_state(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our parameters under transformers' names; they share memory."""
    for name, value in state.items():
        for pattern, replacement in _TRANSFORMERS_NAMES:
            name = re.sub(pattern, replacement, name)
        if ".qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                yield name.replace(".qkv.", f".{letter}_proj."), part
        else:
            yield name, value
