"""The Vision Transformer itself: tokens, masks, pooling, positions, heads, and fine-tuning. Parity: tests/checkpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests import reference
from tests.checkpoints.parity import assert_same, images, randomize
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.errors import InputError
from vit_probe.models.config import ResNetConfig, ViTConfig
from vit_probe.models.layers import DropPath
from vit_probe.models.position_embedding import resize_position_embedding
from vit_probe.models.vit import VisionTransformer
from vit_probe.tokens.grid import TokenGrid

TINY = ViTConfig(image_size=48, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=7)


def tiny(**changes: Any) -> VisionTransformer:
    return randomize(VisionTransformer(replace(TINY, **changes)))  # type: ignore[return-value]


@torch.no_grad()
def test_a_layer_is_the_papers_equations() -> None:
    """Equations 1 to 4 of arXiv:2010.11929, with the literal attention of tests/reference.py."""
    model = tiny(depth=1, num_registers=2).double()
    batch = images(16, 24).double()
    model.resize((16, 24))
    patches = [
        model.patch_embed.proj(batch[:, :, row : row + 8, col : col + 8]).flatten(1)  # type: ignore[union-attr, operator]
        for row in (0, 8)
        for col in (0, 8, 16)
    ]
    prefix = torch.cat([model.cls_token, model.reg_token], dim=1).expand(2, -1, -1)  # type: ignore[list-item]
    z = torch.cat([prefix, torch.stack(patches, dim=1)], dim=1) + model.pos_embed
    block: Any = model.blocks[0]
    query, key, value = (part.reshape(2, 9, 4, 8).transpose(1, 2) for part in block.attn.qkv(block.norm1(z)).chunk(3, dim=-1))
    attention = torch.from_numpy(reference.softmax_attention(query, key, 8**-0.5))
    z = z + block.attn.proj((attention @ value).transpose(1, 2).reshape(2, 9, 32))
    z = z + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(z))))
    torch.testing.assert_close(model.forward_features(batch), model.norm(z))
    torch.testing.assert_close(model(batch), model.head(model.norm(z)[:, 0]))


@torch.no_grad()
def test_a_blocked_key_cannot_matter() -> None:
    """The last patch is hidden from all other tokens: changing its pixels changes its own token only."""
    model = tiny()
    batch, changed = images(48), images(48)
    changed[:, :, -8:, -8:] += 1
    mask = torch.ones(37, 37, dtype=torch.bool)
    mask[:-1, -1] = False
    before, after = model.forward_features(batch, mask=mask), model.forward_features(changed, mask=mask)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert (before[:, -1] - after[:, -1]).abs().max() > 0.1
    assert (model(batch) - model(changed)).abs().max() > 1e-3
    assert torch.equal(model(batch, mask=mask), model(changed, mask=mask))
    added = torch.zeros(37, 37).masked_fill(~mask, -torch.inf)
    assert_same(model(batch, mask=added), model(batch, mask=mask))
    assert_same(model(batch, mask=mask.expand(2, 4, -1, -1)), model(batch, mask=mask))
    # A mask that lets everything through is none.
    assert_same(model(batch, mask=torch.ones(37, 37, dtype=torch.bool)), model(batch))


@torch.no_grad()
def test_pooling() -> None:
    batch = images(48)
    tokens = tiny(num_registers=3, num_classes=0).forward_features(batch)
    mean = tokens[:, 4:].mean(dim=1)
    for pooling, expected in {"token": tokens[:, 0], "avg": mean, "token+avg": torch.cat([tokens[:, 0], mean], 1)}.items():
        model = tiny(num_registers=3, num_classes=0, pooling=pooling)
        torch.testing.assert_close(model(batch), expected)
    two = tiny(distillation_token=True, pooling="distilled")
    tokens = two.forward_features(batch)
    torch.testing.assert_close(two(batch), (two.head(tokens[:, 0]) + two.head_dist(tokens[:, 1])) / 2)  # type: ignore[operator]
    assert not torch.equal(two.head(tokens[:, 0]), two.head_dist(tokens[:, 1]))  # type: ignore[operator]


@torch.no_grad()
def test_norm_after_pooling() -> None:
    model = tiny(pooling="avg", norm_pooled=True)
    tokens = model.forward_features(images(48))
    assert abs(float(tokens.mean(dim=-1).abs().max())) > 0.05  # not normalised yet
    torch.testing.assert_close(model(images(48)), model.head(model.fc_norm(tokens[:, 1:].mean(dim=1))))


@torch.no_grad()
@pytest.mark.parametrize("size", [(48, 48), (64, 40)])
@pytest.mark.parametrize("position", ["learned_1d", "learned_2d", "sincos_2d", "none"])
def test_positions_tell_patches_apart(position: str, size: tuple[int, int]) -> None:
    """Swapping two patches changes the class token's output, unless there are no positions."""
    model = tiny(position=position)
    batch = images(*size)
    swapped = batch.clone()
    swapped[:, :, :8, :8], swapped[:, :, -8:, -8:] = batch[:, :, -8:, -8:], batch[:, :, :8, :8]
    difference = (model(batch) - model(swapped)).abs().max()
    assert difference < 1e-5 if position == "none" else difference > 1e-3


@torch.no_grad()
def test_registers_without_positions_are_all_alike() -> None:
    """With position_prefix=1 only the class token has a position; exchanging registers then changes nothing for the rest."""
    batch = images(48)
    for prefix, same in ((1, True), (None, False)):
        model = tiny(num_registers=3, position_prefix=prefix)
        assert model.pos_embed.shape[1] == (37 if same else 40)  # type: ignore[union-attr]
        before = model(batch)
        model.reg_token.data = model.reg_token[:, [1, 0, 2]]  # type: ignore[union-attr, index]
        assert bool((model(batch) - before).abs().max() < 1e-5) == same
    no_table = tiny(num_registers=3, position_prefix=0)
    assert no_table.pos_embed.shape[1] == 36  # type: ignore[union-attr]


def test_sines_are_fixed_and_the_literal_ones() -> None:
    model = VisionTransformer(replace(TINY, position="sincos_2d"))
    assert isinstance(model.pos_embed, nn.Parameter)
    assert not model.pos_embed.requires_grad
    np.testing.assert_allclose(model.pos_embed[0, 1:].numpy(), reference.sincos_2d(6, 6, 32), atol=1e-6)
    assert not model.pos_embed[0, 0].any()
    model.resize((32, 72))
    np.testing.assert_allclose(model.pos_embed.detach()[0, 1:].numpy(), reference.sincos_2d(4, 9, 32), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("resampling", ["bicubic-antialias", "bicubic", "bicubic-align-corners"])
def test_resizing_once_is_resizing_on_the_fly(resampling: str) -> None:
    for position in ("learned_1d", "learned_2d", "sincos_2d", "none"):
        model = tiny(position=position, position_resampling=resampling, num_registers=2)
        native = model(images(48))
        on_the_fly = model(images(64, 40))
        table = model.pos_embed
        assert model.resize((64, 40)) is model
        assert model.config.image_size == (64, 40)
        torch.testing.assert_close(model(images(64, 40)), on_the_fly)
        assert_same(native, native)
        if position == "learned_1d":
            expected = resize_position_embedding(table, (6, 6), (8, 5), num_prefix_tokens=3, resampling=resampling)  # type: ignore[arg-type]
            assert torch.equal(model.pos_embed, expected)  # type: ignore[arg-type]
            assert model.pos_embed.requires_grad  # type: ignore[union-attr]


def test_a_resized_model_trains() -> None:
    model = tiny().resize(64).train()
    model(images(64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_new_head_is_zero_and_nothing_else_changes() -> None:
    model = tiny()
    body = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("head")}
    assert model.replace_head(5) is model
    assert model.config.num_classes == 5
    assert torch.equal(model(images(48)), torch.zeros(2, 5))
    assert model.head.weight.shape == (5, 32)  # type: ignore[union-attr]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in body.items())
    features = model.replace_head(0)(images(48))
    assert torch.equal(features, model.forward_features(images(48))[:, 0])
    assert VisionTransformer(TINY).head.weight.abs().max() == 0  # type: ignore[operator, union-attr]
    two = tiny(distillation_token=True, pooling="distilled").double().replace_head(5)
    assert two.head_dist.weight.shape == (5, 32)  # type: ignore[union-attr]
    assert two.head.weight.dtype == torch.float64  # type: ignore[union-attr]
    assert tiny(pooling="token+avg").replace_head(5).head.weight.shape == (5, 64)  # type: ignore[union-attr]


def test_dropout_is_for_training_only() -> None:
    model = tiny(dropout=0.3)
    assert torch.equal(model(images(48)), model(images(48)))
    model.train()
    torch.manual_seed(0)
    first, second = model(images(48)), model(images(48))
    assert (first - second).abs().max() > 1e-2
    assert torch.equal(tiny(dropout=0.3).eval()(images(48)), tiny()(images(48)))
    assert torch.equal(tiny().train()(images(48)), tiny()(images(48)))


def test_stochastic_depth_leaves_whole_branches_out_and_scales_the_rest() -> None:
    """Literally, per image: nothing, or the branch over the probability of keeping it; about as often as the rate says."""
    torch.manual_seed(0)
    layer = DropPath(0.4).train()
    branch = torch.rand(1000, 3, 2) + 1
    out = layer(branch)
    left_out = (out == 0).flatten(1).all(dim=1)
    assert 0.35 < left_out.float().mean() < 0.45
    torch.testing.assert_close(out[~left_out], branch[~left_out] / 0.6)
    assert torch.equal(layer.eval()(branch), branch)


def test_stochastic_depth_grows_with_depth_and_is_for_training_only() -> None:
    model = tiny(drop_path=0.9, depth=4)
    for name in ("drop_path1", "drop_path2"):
        assert [getattr(block, name).rate for block in model.blocks] == pytest.approx([0, 0.3, 0.6, 0.9])
    assert torch.equal(model(images(48)), tiny(depth=4)(images(48)))
    model.train()
    torch.manual_seed(0)
    first, second = model(images(48)), model(images(48))
    assert (first - second).abs().max() > 1e-2
    assert [block.drop_path1.rate for block in tiny(drop_path=0.9, depth=1).blocks] == [0]


class ConvStem(nn.Sequential):
    """Two convolutions of stride 4 and 2 in place of the patch projection."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__(nn.Conv2d(3, 16, 4, stride=4), nn.ReLU(), nn.Conv2d(16, dim, 2, stride=2))


@torch.no_grad()
def test_a_stem_of_ones_own() -> None:
    stem = ConvStem()
    model = randomize(VisionTransformer(TINY, stem=stem))
    assert model.patch_embed is stem
    out = model.forward_features(images(40, 72))  # type: ignore[operator]
    assert out.shape == (2, 46, 32)
    with pytest.raises(InputError, match=r"stem returned a map of shape \(2, 30, 6, 6\).*calls for \(batch, 32, 6, 6\)"):
        VisionTransformer(TINY, stem=ConvStem(30))(images(48))


@torch.no_grad()
def test_the_hybrid_takes_its_grid_from_the_feature_map() -> None:
    model = tiny(stem=ResNetConfig((1, 1), width=32), patch_size=1)
    assert model.token_grid(48, 64) == TokenGrid(6, 8, (8, 8), 1, True)
    assert model.forward_features(images(48, 64)).shape == (2, 49, 32)


@pytest.mark.parametrize(
    ("changes", "grid"),
    [
        ({}, TokenGrid(5, 9, (8, 8), 1, True)),
        ({"num_registers": 4, "distillation_token": True}, TokenGrid(5, 9, (8, 8), 6, True)),
        ({"class_token": False, "pooling": "avg", "num_registers": 2}, TokenGrid(5, 9, (8, 8), 2, False)),
        ({"patch_size": (4, 24)}, TokenGrid(10, 3, (4, 24), 1, True)),
    ],
)
def test_the_token_grid_counts_the_tokens(changes: dict[str, Any], grid: TokenGrid) -> None:
    model = tiny(**changes)
    assert model.token_grid(40, 72) == grid
    with torch.no_grad():
        assert model.forward_features(images(40, 72)).shape[1] == grid.num_tokens


@torch.no_grad()
def test_batches_do_not_mix() -> None:
    model = tiny()
    assert_same(model(images(48)[1:]), model(images(48))[1:])


def test_attention_goes_through_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    original = nn.functional.scaled_dot_product_attention

    def counting(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(tuple(query.shape))
        return original(query, *arguments, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counting)
    tiny()(images(48))
    assert calls == [(2, 4, 37, 8)] * 2


def test_images_that_do_not_fit() -> None:
    model = tiny()
    with pytest.raises(InputError, match=r"takes images \(batch, 3, height, width\), got shape \(2, 1, 48, 48\)"):
        model(images(48)[:, :1])
    with pytest.raises(InputError, match=r"takes images \(batch, 3, height, width\), got shape \(3, 48, 48\)"):
        model(images(48)[0])
    with pytest.raises(InputError, match="50 x 48 pixels does not divide into patches of 8 x 8"):
        model(images(50, 48))
    with pytest.raises(InputError, match="does not divide into patches"):
        model.resize(50)
    assert model.config.image_size == (48, 48)
    with pytest.raises(InputError, match=r"num_classes must be 0 \(no head\) or more, got -1"):
        model.replace_head(-1)


def test_resizing_replaces_the_tables_of_learned_2d_positions() -> None:
    model = tiny(position="learned_2d")
    before = model(images(64))
    model.resize(64)
    side = 64 // model.config.patch_stride[0]
    assert model.pos_embed.grid == (side, side)
    torch.testing.assert_close(model(images(64)), before)


def test_resizing_takes_the_preprocessing_along() -> None:
    model = tiny()
    model.preprocessing = Preprocessing(size=(48, 48), resize=60)
    assert model.resize(64).preprocessing == Preprocessing(size=(64, 64), resize=80)
