"""The layer that sees the image: convolutions, linear layers over the pixels of patches, and what is neither."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from transformers import ViTMAEConfig, ViTMAEModel

from tests.attention.test_hooks import leaves_nothing
from vit_probe import InputError
from vit_probe.tokens.patch_embedding import find_patch_embedding, input_channels, native_image_size, read_patch_size

ORDERS = {
    "pixels first": "b c (h p1) (w p2) -> b h w (p1 p2 c)",
    "channels first": "b c (h p1) (w p2) -> b (h w) (c p1 p2)",
    "columns first": "b c (h p1) (w p2) -> b (h w) (p2 c p1)",
}


def linear_embedding(pattern: str, patch: tuple[int, int] = (8, 4), channels: int = 3, *, norm: bool = True) -> nn.Sequential:
    """A linear layer over rearranged pixels, as vit-pytorch embeds patches."""
    torch.manual_seed(0)
    width = patch[0] * patch[1] * channels
    scale = nn.LayerNorm(width)
    nn.init.normal_(scale.weight)  # of both signs
    nn.init.normal_(scale.bias)
    return nn.Sequential(
        Rearrange(pattern, p1=patch[0], p2=patch[1]), scale if norm else nn.Identity(), nn.Linear(width, 10), nn.LayerNorm(10)
    )


@pytest.mark.parametrize(
    ("order", "channels"), [("pixels first", 3), ("pixels first", 13), ("channels first", 1), ("columns first", 4)]
)
def test_pixels_of_a_linear_layer(order: str, channels: int) -> None:
    model = linear_embedding(ORDERS[order], channels=channels)
    with leaves_nothing(model):
        found = find_patch_embedding(model)
    inputs = ORDERS[order].split("(")[-1].rstrip(")")
    expected = rearrange(model[2].weight.double(), f"filter ({inputs}) -> filter c p1 p2", p1=8, p2=4, c=channels)
    assert torch.equal(found.filters, expected)
    assert (found.path, found.stride, found.channels) == ("2", (8, 4), channels)
    assert input_channels(model) == channels
    assert read_patch_size(model) == (8, 4)


def test_a_linear_layer_without_modules_before_it() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(5 * 5 * 3, 7)

        def forward(self, x: Tensor) -> Tensor:
            patches = x.unfold(2, 5, 5).unfold(3, 5, 5).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
            return self.proj((patches - patches.mean(-1, keepdim=True)) / patches.std(-1, keepdim=True))

    model = Patches()
    assert torch.equal(find_patch_embedding(model).filters, model.proj.weight.double().unflatten(1, (3, 5, 5)))
    assert read_patch_size(model) == (5, 5)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_quantised_filters() -> None:
    model = linear_embedding(ORDERS["channels first"])
    found = find_patch_embedding(quantize_dynamic(model, {nn.Linear}))
    torch.testing.assert_close(found.filters, find_patch_embedding(model).filters, rtol=0, atol=1e-3)
    assert not torch.equal(found.filters, find_patch_embedding(model).filters)


def test_the_first_layer_to_be_called_counts_not_the_first_to_be_listed() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neck, self.scale, self.patches = nn.Conv2d(3, 5, 3), nn.Linear(1, 1), nn.Conv2d(3, 3, 4, 4)
            self.smooth = nn.AvgPool2d(3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.neck(self.patches(self.smooth(x)) * self.scale(x.new_ones(1, 1)))

    found = find_patch_embedding(Model())
    assert found.path == "patches"
    assert found.stride == read_patch_size(Model()) == (4, 4)


def test_a_convolution_over_rearranged_pixels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 6, 1))
    found = find_patch_embedding(model)
    assert torch.equal(found.filters, model[1].weight.double().reshape(6, 3, 4, 4))
    assert found.stride == (4, 4)


def test_models_that_take_more_than_images_list_their_convolution() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.text = nn.Conv2d(3, 5, 4, 2), nn.Embedding(3, 5)

        def forward(self, images: Tensor, text: Tensor) -> Tensor:
            return self.conv(images).mean((2, 3)) @ self.text(text).T

    found = find_patch_embedding(Tower())
    assert (found.path, found.stride) == ("conv", (2, 2))


def test_patch_size_from_the_convolution_that_sees_the_image() -> None:
    assert read_patch_size(nn.Sequential(nn.Conv2d(3, 8, (4, 6), (4, 6)), nn.Conv2d(8, 8, 2, 2))) == (4, 6)
    for first in (nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(3, 8, 1)):
        with pytest.raises(InputError, match=r"no first layer over patches that do not overlap; pass grid"):
            read_patch_size(nn.Sequential(first, nn.Conv2d(8, 8, 7, 7)))


def test_models_of_timm_that_take_plain_images_or_patches() -> None:
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    model = NaFlexVit(NaFlexVitCfg(patch_size=8, embed_dim=16, depth=1, num_heads=2, pos_embed_grid_size=(4, 6)), in_chans=4)
    assert native_image_size(model) == (32, 48)
    assert read_patch_size(model) == (8, 8)
    assert torch.equal(
        find_patch_embedding(model).filters,
        rearrange(model.embeds.proj.weight.double(), "filter (p1 p2 c) -> filter c p1 p2", p1=8, p2=8),
    )


# Errors


def test_pixels_in_no_order_of_patches() -> None:
    class Shuffled(nn.Module):
        def __init__(self, order: Tensor) -> None:
            super().__init__()
            self.proj, self.order = nn.Linear(48, 8), order

        def forward(self, x: Tensor) -> Tensor:
            patches = rearrange(x, "b c (h p1) (w p2) -> b (h w) (c p1 p2)", p1=4, p2=4)
            return self.proj(patches[:, self.order[: patches.shape[1]]])

    for model in (Shuffled(torch.arange(576).flip(0)), nn.Sequential(nn.Flatten(2), nn.Linear(96 * 96, 4))):
        message = r"the first layer of \w+ \(\w+\), a Linear, is not applied to the pixels of one patch after the other"
        with pytest.raises(InputError, match=message):
            find_patch_embedding(model)


def test_videos() -> None:
    class Video(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x.flatten(0, 1)[None])

    with pytest.raises(InputError, match="Video takes videos: its convolutions extend over time; pass a model of images"):
        find_patch_embedding(Video())


def test_a_model_without_patches_cannot_be_read() -> None:
    with pytest.raises(InputError, match=r"cannot determine the patch size of Linear.*pass grid=TokenGrid"):
        read_patch_size(nn.Linear(2, 2))
    with pytest.raises(
        InputError, match="Linear has no convolution or linear layer that sees the pixels of an image; pass a mo"
    ):
        find_patch_embedding(nn.Linear(2, 2))
    assert input_channels(nn.Linear(2, 2)) == 3


def test_a_model_that_shuffles_its_patches() -> None:
    config = ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(InputError, match="ViTMAEModel drops and shuffles patches at random"):
        read_patch_size(ViTMAEModel(config))
