"""locate_tokens: where the tokens of a model lie; a wrong grid is never returned."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.attention.test_hooks import leaves_nothing
from tests.example_models import FAMILIES, Encoder, images, small_vit, transformers_vit
from vit_probe import InputError, TokenGrid, attention_hooks
from vit_probe.models.config import ResNetConfig
from vit_probe.tokens.locate import locate_tokens

# Attention over the whole image


@pytest.mark.parametrize(
    ("options", "prefix", "has_cls"),
    [
        ({}, 1, True),
        ({"num_registers": 3}, 4, True),
        ({"distillation_token": True, "pooling": "distilled"}, 2, True),
        ({"class_token": False, "pooling": "avg"}, 0, False),
        ({"class_token": False, "pooling": "avg", "num_registers": 2}, 2, False),
    ],
)
def test_grid_of_our_own_model(options: dict, prefix: int, has_cls: bool) -> None:
    model = small_vit(**options)
    assert locate_tokens(model, 24, 24).grid == TokenGrid(3, 4, (8, 6), prefix, has_cls)
    assert locate_tokens(model, 40, 12).grid == TokenGrid(5, 2, (8, 6), prefix, has_cls)


def test_grid_of_our_own_hybrid_counts_the_stems_stride() -> None:
    model = small_vit(image_size=(32, 64), patch_size=(2, 1), stem=ResNetConfig(layers=(1, 1), width=32))
    assert locate_tokens(model, 32, 64).grid == TokenGrid(2, 8, (16, 8), 1, True)
    with attention_hooks(model, Checks(locate_tokens(model, 32, 64).grid)):
        model(images(32, 64, batch=1))


class Checks:
    """An observer that only counts tokens."""

    def __init__(self, grid: TokenGrid) -> None:
        self.grid = grid

    def update(self, tile) -> None:
        self.grid.check_tokens(tile.num_tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_grid_of_every_family(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    grid = locate_tokens(model, *family.size).grid
    assert grid == family.grid
    with attention_hooks(model, Checks(grid)):
        model(family.images(1))


def _timm(name: str, **options) -> nn.Module:
    import timm

    return timm.create_model(name, embed_dim=24, depth=1, num_heads=2, **options)


@pytest.mark.parametrize(
    ("build", "size", "grid"),
    [
        (lambda: _timm("deit_tiny_distilled_patch16_224", img_size=(32, 48)), (32, 48), TokenGrid(2, 3, (16, 16), 2, True)),
        (
            lambda: _timm("vit_tiny_patch16_224", img_size=(32, 48), patch_size=(16, 8)),
            (32, 48),
            TokenGrid(2, 6, (16, 8), 1, True),
        ),
        (lambda: _timm("vit_tiny_r_s16_p8_224", img_size=(64, 96)), (64, 96), TokenGrid(2, 3, (32, 32), 1, True)),
        (
            lambda: _timm("vit_tiny_patch16_224", img_size=32, dynamic_img_size=True),
            (64, 32),
            TokenGrid(4, 2, (16, 16), 1, True),
        ),
        (lambda: transformers_vit("DeiT"), (32, 48), TokenGrid(4, 6, (8, 8), 2, True)),
        (lambda: transformers_vit("DINOv3ViT", num_register_tokens=2), (32, 48), TokenGrid(4, 6, (8, 8), 3, True)),
        (lambda: transformers_vit("CLIPVision", image_size=32), (32, 32), TokenGrid(4, 4, (8, 8), 1, True)),
        (lambda: transformers_vit("Beit", image_size=32), (32, 32), TokenGrid(4, 4, (8, 8), 1, True)),
        (lambda: transformers_vit("IJepa"), (32, 48), TokenGrid(4, 6, (8, 8), 0, False)),
    ],
)
def test_grid_of_other_models(build, size: tuple[int, int], grid: TokenGrid) -> None:
    model = build().eval()
    assert locate_tokens(model, *size).grid == grid
    with attention_hooks(model, Checks(grid)):
        model(images(*size, batch=1))


def test_layers_and_skipped_attention() -> None:
    layout = locate_tokens(FAMILIES["transformers-siglip"].model(), 32, 32)
    assert layout.layers == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    assert layout.skipped == {"head.attention": "1 query for 16 keys"}
    assert layout.windows == {}


def test_pixels_that_do_not_fill_a_patch_are_left_out() -> None:
    assert locate_tokens(Encoder(), 35, 55).grid == TokenGrid(4, 6, (8, 8), 0, False)


def test_pixels_that_are_padded_to_a_patch() -> None:
    from timm.models.vision_transformer import VisionTransformer

    sizes = dict(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    model = VisionTransformer(**sizes, dynamic_img_size=True, dynamic_img_pad=True)
    assert locate_tokens(model, 35, 55).grid == TokenGrid(5, 7, (8, 8), 1, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_of_another_precision(dtype: torch.dtype) -> None:
    for name in ("timm-dinov3", "ours"):
        family = FAMILIES[name]
        assert locate_tokens(family.model().to(dtype), *family.size).grid == family.grid


def test_the_model_is_left_as_it_was() -> None:
    model = small_vit(dropout=0.5).train()
    model.blocks[1].eval()
    modes = {module: module.training for module in model.modules()}
    with leaves_nothing(model):
        locate_tokens(model, 24, 24)
    assert {module: module.training for module in model.modules()} == modes
    assert all(parameter.grad is None for parameter in model.parameters())


# Windows


class Windowed(nn.Module):
    """A layer within windows, then one over all; `arrange` says which patches share one, `mix` how many are mixed before."""

    def __init__(self, arrange: Callable[[Tensor], Tensor], *, mix: int = 1, window_major: bool = False) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 4, 4)
        self.mix = nn.Conv2d(16, 16, mix, padding=mix // 2)
        self.first, self.second = nn.Identity(), nn.Identity()
        self.arrange, self.window_major = arrange, window_major

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.patch_embed(x)).permute(0, 2, 3, 1)
        windows = self.arrange(x)  # (image, window, token, dim)
        folded = windows.transpose(0, 1) if self.window_major else windows
        folded = folded.flatten(0, 1)[:, None]
        within = F.scaled_dot_product_attention(folded, folded, folded)
        x = x.flatten(1, 2)[:, None] + 0 * within.mean()
        return F.scaled_dot_product_attention(x, x, x)


def _blocks(x: Tensor) -> Tensor:
    """Windows of 2 x 3 neighbouring patches."""
    return x.unflatten(1, (-1, 2)).unflatten(3, (-1, 3)).transpose(2, 3).flatten(1, 2).flatten(2, 3)


def _strided(x: Tensor) -> Tensor:
    """Windows of patches that lie 2 apart (MaxViT's grid attention)."""
    return x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2, 3)


def _shifted(x: Tensor) -> Tensor:
    return _blocks(x.roll((-1, -2), (1, 2)))


def _padded(x: Tensor) -> Tensor:
    """Windows of 3 x 4 patches, after zeros below and to the right."""
    x = F.pad(x, (0, 0, 0, 2, 0, 2))
    return x.unflatten(1, (-1, 3)).unflatten(3, (-1, 4)).transpose(2, 3).flatten(1, 2).flatten(2, 3)


@pytest.mark.parametrize("mix", [1, 3], ids=["plain patches", "mixed patches"])
@pytest.mark.parametrize("arrange", [_blocks, _strided, _shifted, _padded])
def test_windows_of_any_arrangement(arrange: Callable[[Tensor], Tensor], mix: int) -> None:
    torch.manual_seed(0)
    layout = locate_tokens(Windowed(arrange, mix=mix), 16, 24)
    assert layout.grid == TokenGrid(4, 6, (4, 4), 0, False)
    assert list(layout.windows) == [0]
    assert layout.grid_of(0) == layout.grid_of(1) == layout.grid
    expected = arrange(1 + torch.arange(24.0).view(1, 4, 6, 1))[0, :, :, 0].long() - 1
    assert layout.windows[0].grid == layout.grid
    np.testing.assert_array_equal(layout.windows[0].patches, expected)


def test_windows_ordered_by_window_before_image_raise() -> None:
    with pytest.raises(InputError, match=r"Windowed mixes the windows or heads of different images: .* cannot be told apart"):
        locate_tokens(Windowed(_blocks, window_major=True), 16, 24)


def test_windows_that_cannot_be_placed_raise() -> None:
    with pytest.raises(
        InputError,
        match=r"layer 0 \(the model itself\) attends over 4 windows of 6 tokens whose positions .* cannot be determined",
    ):
        locate_tokens(Windowed(_blocks, mix=7), 16, 24)


# Stems that mix neighbouring patches


class Mixing(nn.Module):
    """A stem in which every patch depends on its neighbours; `arrange` orders the rows and columns of the tokens."""

    def __init__(self, arrange: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed, self.mix = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 16, 3, padding=1)
        self.arrange = arrange

    def forward(self, x: Tensor) -> Tensor:
        x = self.arrange(self.mix(self.patch_embed(x))).flatten(2).mT[:, None]
        return F.scaled_dot_product_attention(x, x, x)


def test_patches_in_order_behind_a_stem_that_mixes_them() -> None:
    assert locate_tokens(Mixing(lambda x: x), 32, 32).grid == TokenGrid(8, 8, (4, 4), 0, False)


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x.flip(2),
        lambda x: x.flip(3),
        lambda x: x.rot90(1, (2, 3)),
        lambda x: x.rot90(2, (2, 3)),
        lambda x: x.roll((4, 4), (2, 3)),
    ],
    ids=["upside down", "mirrored", "rotated", "rotated twice", "shifted"],
)
def test_patches_in_another_order_behind_a_stem_that_mixes_them_raise(arrange: Callable[[Tensor], Tensor]) -> None:
    """Most patches are then between a third of the grid's side and all of it away from their places."""
    with pytest.raises(InputError, match="does not order its tokens as"):
        locate_tokens(Mixing(arrange), 32, 32)


# Attention that is not captured, or not self-attention


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["changed", "traced"])
def test_a_layer_that_cannot_be_captured_among_others_that_can(block: int, how: str) -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2).eval()
    if how == "changed":
        model.blocks[block].attn.fused_attn, model.blocks[block].attn.attn_drop = False, torch.nn.Threshold(0.1, 0.0)
    else:
        model.blocks[block] = torch.jit.trace(model.blocks[block], torch.randn(1, 17, 16))
    match = (
        rf"attention of 1 module.* of VisionTransformer could not be captured \(blocks.{block}.*though that of 2 layers could"
    )
    with leaves_nothing(model), pytest.raises(InputError, match=match):
        locate_tokens(model, 32, 32)
    with pytest.raises(InputError, match=match), attention_hooks(model):
        model(images(32, 32))


class Core(nn.Module):
    """Attention that is given queries, keys and values with their heads."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def test_keys_of_other_patches_are_not_self_attention() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed, self.core, self.other = nn.Conv2d(3, 16, 4, 4), Core(), Core()

        def forward(self, x: Tensor) -> Tensor:
            x, y = (self.patch_embed(side).flatten(2).mT[:, None] for side in (x, x.flip(2)))
            x = x + self.core(x, x, x)
            return x + self.other(x, y, y)

    with pytest.raises(InputError, match=r"layer 1 \(other\) is not self-attention, though it has as many keys as queries"):
        locate_tokens(Crossed(), 16, 24)


def test_heads_ordered_before_images_raise() -> None:
    class HeadsFirst(nn.Module):
        def __init__(self, *, heads_first: bool) -> None:
            super().__init__()
            self.patch_embed, self.num_heads, self.heads_first = nn.Conv2d(3, 16, 4, 4), 2, heads_first

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch_embed(x).flatten(2).mT.unflatten(-1, (2, 8)).transpose(1, 2)  # image, head, token, dim
            x = (x.transpose(0, 1) if self.heads_first else x).flatten(0, 1)
            return F.scaled_dot_product_attention(x, x, x)

    assert locate_tokens(HeadsFirst(heads_first=False), 16, 24).grid == TokenGrid(4, 6, (4, 4), 0, False)
    with pytest.raises(InputError, match="mixes the windows or heads of different images"):
        locate_tokens(HeadsFirst(heads_first=True), 16, 24)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_type(dtype: torch.dtype) -> None:
    model = small_vit()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        assert locate_tokens(model, 24, 24).grid == TokenGrid(3, 4, (8, 6), 1, True)
    finally:
        torch.set_default_dtype(before)


# Errors


def test_an_image_that_does_not_divide() -> None:
    with pytest.raises(InputError, match="25 x 24 pixels does not divide into patches of 8 x 6"):
        locate_tokens(small_vit(), 25, 24)


def test_images_that_the_model_does_not_take() -> None:
    for name, message in {
        "timm": r"VisionTransformer cannot take images of 40 x 48 pixels \(Input height \(40\) doesn't match model \(32\)\.\)",
        "transformers-siglip": r"SiglipVisionModel cannot take images of 40 x 48 pixels \(.*\); pass images of the size",
    }.items():
        with pytest.raises(InputError, match=message):
            locate_tokens(FAMILIES[name].model(), 40, 48)


def test_a_grid_that_was_given_is_checked() -> None:
    model = small_vit()
    for grid, message in {
        TokenGrid(4, 3, (8, 6), 1, True): r"does not order its tokens as .* says",
        TokenGrid(2, 6, (8, 6), 1, True): r"make 3 x 4 patches, which .* does not fit",
        TokenGrid(3, 4, (8, 6), 2, True): r"makes 13 tokens of images of 24 x 24 pixels, 12 of which depend .* accounts for 14",
        TokenGrid(3, 4, (8, 6), 0, False): r"makes 13 tokens .* accounts for 12",
    }.items():
        with pytest.raises(InputError, match=message):
            locate_tokens(model, 24, 24, grid=grid)
    assert locate_tokens(model, 24, 24, grid=TokenGrid(3, 4, (8, 6), 1, False)).grid.has_cls_token is False


def test_attention_that_is_not_captured() -> None:
    model = FAMILIES["timm"].model()
    for block in model.blocks:
        block.attn.fused_attn, block.attn.attn_drop = False, torch.nn.Threshold(0.1, 0.0)
    with leaves_nothing(model), pytest.raises(InputError, match="VisionTransformer was called, but no self-attention could be"):
        locate_tokens(model, 32, 48)


def test_under_autocast() -> None:
    model = FAMILIES["timm"].model()
    with torch.autocast("cpu", torch.bfloat16):
        assert locate_tokens(model, 32, 48).grid == FAMILIES["timm"].grid


@pytest.mark.parametrize("padding", [0, 1])
def test_patches_of_a_padded_image(padding: int) -> None:
    """They lie an eighth of their side beside the cells of the grid."""
    model = FAMILIES["encoder"].model()
    model.proj.padding = (padding, padding)
    assert locate_tokens(model, 32, 48).grid == FAMILIES["encoder"].grid


def test_graphs_whose_mode_is_fixed() -> None:
    model = FAMILIES["encoder"].model()
    any_number = ({0: torch.export.Dim.DYNAMIC},)
    graph = torch.export.export(model.eval(), (torch.randn(2, 3, 32, 48),), dynamic_shapes=any_number).module()
    assert locate_tokens(graph, 32, 48, grid=FAMILIES["encoder"].grid).grid == FAMILIES["encoder"].grid


def test_the_patch_size_that_a_model_names() -> None:
    model = FAMILIES["encoder"].model()
    torch.manual_seed(0)
    model.proj = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 32, 2, 2))
    model.patch_size = 8
    assert locate_tokens(model, 32, 48).grid == FAMILIES["encoder"].grid
