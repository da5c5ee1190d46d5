"""Patch embeddings: a linear projection of each patch, and the hybrid's BiT ResNet."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vit_probe.models.config import ResNetConfig, ViTConfig, as_pair

__all__ = ["BiTResNet", "HybridEmbed", "PatchEmbed"]


class PatchEmbed(nn.Module):
    """Linear projection of each patch of pixels, as a convolution whose stride equals its kernel size.

    Args:
        config: The model's configuration.

    Examples:
        >>> PatchEmbed(ViTConfig(patch_size=8, embed_dim=24, num_heads=3))(torch.rand(2, 3, 32, 48)).shape
        torch.Size([2, 24, 4, 6])
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        size = as_pair(config.patch_size, "patch_size")
        self.proj = nn.Conv2d(config.in_channels, config.embed_dim, size, stride=size, bias=config.patch_bias)
        _lecun_normal(self.proj)

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch dim row col"]:
        return self.proj(images)


class HybridEmbed(nn.Module):
    """A BiT ResNet, and a linear projection of each patch of its feature map (in the papers, of each cell).

    Args:
        config: The model's configuration, with a `stem`.

    Examples:
        >>> config = ViTConfig(32, 1, embed_dim=24, num_heads=3, stem=ResNetConfig((1, 1), width=32))
        >>> HybridEmbed(config)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 24, 4, 4])
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        assert config.stem is not None
        size = as_pair(config.patch_size, "patch_size")
        self.backbone = BiTResNet(config.stem, config.in_channels)
        self.proj = nn.Conv2d(config.stem.out_channels, config.embed_dim, size, stride=size, bias=config.patch_bias)
        _lecun_normal(self.proj)

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch dim row col"]:
        return self.proj(self.backbone(images))


class BiTResNet(nn.Module):
    """ResNet with weight-standardised convolutions, group norm and "same" padding.

    Norm and ReLU follow each convolution, as in the original ResNet (version 1).

    Args:
        config: Depth and width.
        in_channels: Colour channels of the input.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.1 (ResNet (BiT)); Qiao et al. 2019, arXiv:1903.10520 (weight
        standardisation); Wu & He 2018, arXiv:1803.08494 (group norm).

    Examples:
        >>> BiTResNet(ResNetConfig((1, 1), width=32))(torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 256, 4, 4])
    """

    def __init__(self, config: ResNetConfig, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        self.stem.add_module("conv", StdConv2d(in_channels, config.width, 7, stride=2))
        self.stem.add_module("norm", GroupNormReLU(config.width))
        self.stem.add_module("pool", SameMaxPool2d())
        self.stages = nn.Sequential()
        width_in = config.width
        for index, units in enumerate(config.layers):
            width = config.width * 4 * 2**index
            strides = [2 if unit == 0 and index > 0 else 1 for unit in range(units)]
            units_of_stage = [
                Bottleneck(width_in if unit == 0 else width, width, stride) for unit, stride in enumerate(strides)
            ]
            stage = nn.Sequential()
            stage.add_module("blocks", nn.Sequential(*units_of_stage))
            self.stages.append(stage)
            width_in = width

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch feature row col"]:
        return self.stages(self.stem(images))


class Bottleneck(nn.Module):
    """Residual unit of a 1x1, a 3x3 and a 1x1 convolution; its shortcut is projected if the shape changes."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        middle = width_out // 4
        self.downsample = None
        if stride != 1 or width_in != width_out:
            self.downsample = nn.Sequential()
            self.downsample.add_module("conv", StdConv2d(width_in, width_out, 1, stride=stride))
            self.downsample.add_module("norm", GroupNorm(width_out))
        self.conv1, self.norm1 = StdConv2d(width_in, middle, 1), GroupNormReLU(middle)
        self.conv2, self.norm2 = StdConv2d(middle, middle, 3, stride=stride), GroupNormReLU(middle)
        self.conv3, self.norm3 = StdConv2d(middle, width_out, 1), GroupNorm(width_out)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.norm1(self.conv1(x))
        x = self.norm2(self.conv2(x))
        return F.relu(self.norm3(self.conv3(x)) + shortcut)


class StdConv2d(nn.Conv2d):
    """Convolution with "same" padding and no bias, whose filters are standardised to mean 0 and variance 1 before use."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(width_in, width_out, kernel, stride=stride, bias=False)
        _lecun_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) * torch.rsqrt(variance + 1e-8)
        return F.conv2d(_pad_same(x, self.kernel_size[0], self.stride[0]), weight, stride=self.stride)


class GroupNorm(nn.GroupNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(32, channels, eps=1e-5)


class GroupNormReLU(GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class SameMaxPool2d(nn.Module):
    """3 x 3 max pooling of stride 2 with "same" padding."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(_pad_same(x, 3, 2, value=-torch.inf), 3, stride=2)


def _pad_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Pads so that the output has ceil(size / stride) cells; the odd pixel goes below and to the right, as in JAX."""
    down, right = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
    return F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2), value=value)


def _lecun_normal(conv: nn.Conv2d) -> None:
    nn.init.trunc_normal_(conv.weight, std=(conv.weight[0].numel()) ** -0.5)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
