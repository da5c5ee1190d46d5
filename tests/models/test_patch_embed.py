"""The patch stem as the linear map that it is, and the hybrid stem against timm's and against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.checkpoints.parity import assert_same, images, randomize
from vit_probe.models.config import ResNetConfig, ViTConfig
from vit_probe.models.patch_embed import BiTResNet, HybridEmbed, PatchEmbed

timm = pytest.importorskip("timm")

from timm.layers import StdConv2dSame  # noqa: E402
from timm.models.resnetv2 import ResNetV2  # noqa: E402


def test_patches_are_projected_one_by_one() -> None:
    stem = randomize(PatchEmbed(ViTConfig(image_size=(16, 24), patch_size=(4, 8), embed_dim=12, num_heads=1)))
    batch = images(16, 24)
    out = stem(batch)
    assert out.shape == (2, 12, 4, 3)
    for row in range(4):
        for col in range(3):
            patch = batch[:, :, row * 4 : row * 4 + 4, col * 8 : col * 8 + 8].flatten(1)
            torch.testing.assert_close(out[:, :, row, col], patch @ stem.proj.weight.flatten(1).T + stem.proj.bias)  # type: ignore[union-attr, operator]


def test_a_patch_stem_without_bias() -> None:
    assert PatchEmbed(ViTConfig(patch_bias=False)).proj.bias is None


@pytest.mark.parametrize("layers", [(2, 2, 2, 2), (3, 4, 9), (1,), (1, 2)])
@pytest.mark.parametrize("size", [(64, 64), (72, 100)])
def test_the_resnet_is_timms(layers: tuple[int, ...], size: tuple[int, int]) -> None:
    """Also where sizes are odd on the way, so that "same" padding is not symmetric; in float64, which shows any difference."""
    channels = tuple(256 * 2**stage for stage in range(len(layers)))
    theirs = ResNetV2(
        layers=layers, channels=channels, num_classes=0, global_pool="", preact=False, stem_type="same",
        conv_layer=lambda *a, **k: StdConv2dSame(*a, **k, eps=1e-8),
    )  # fmt: skip
    ours = BiTResNet(ResNetConfig(layers))
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        out = ours.double()(images(*size).double())
        assert_same(out, theirs.double()(images(*size).double()), tolerance=1e-9)
    stride = ResNetConfig(layers).stride
    assert out.shape[1:] == (ResNetConfig(layers).out_channels, -(-size[0] // stride), -(-size[1] // stride))


def test_scale_and_shift_of_filters_do_not_matter() -> None:
    """Weight standardisation takes both away."""
    stem = randomize(BiTResNet(ResNetConfig((1,), width=32))).double()
    with torch.no_grad():
        before = stem(images(32).double())
        for module in stem.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(3).add_(0.7)
        torch.testing.assert_close(stem(images(32).double()), before, rtol=1e-6, atol=1e-6)


def test_the_hybrid_projects_cells_of_the_map() -> None:
    config = ViTConfig(image_size=64, patch_size=2, embed_dim=12, num_heads=1, stem=ResNetConfig((1, 1), width=32))
    stem = randomize(HybridEmbed(config))
    with torch.no_grad():
        out = stem(images(64, 96))
        assert out.shape == (2, 12, 4, 6)
        features = stem.backbone(images(64, 96))  # type: ignore[operator]
        torch.testing.assert_close(out, F.conv2d(features, stem.proj.weight, stem.proj.bias, stride=2))  # type: ignore[union-attr, arg-type]
