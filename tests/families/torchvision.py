"""The families of torchvision."""

from __future__ import annotations

from torch import nn
from torchvision.models import VisionTransformer

from tests.families import multihead
from tests.families.family import Family, Size, blocks


def vit(size: Size) -> nn.Module:
    return VisionTransformer(
        image_size=size[0], patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5
    )


FAMILIES = [
    Family(
        "torchvision",
        "ViT",
        vit,
        unfused=multihead.unfused,
        layers=blocks("encoder.layers.encoder_layer_{}.self_attention"),
        sizes=((32, 32), (48, 48)),
    )
]
