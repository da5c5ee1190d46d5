"""The Vision Transformer itself: tokens, masks, pooling, positions, heads, and fine-tuning. Parity: tests/checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tests import reference
from tests.checkpoints.parity import assert_same, images, randomize
from tests.example_models import Assemble
from vit_probe import attention_hooks, load_model, mean_attention_distance, save_model
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.errors import InputError
from vit_probe.models.config import Position, ResNetConfig, ViTConfig
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
@pytest.mark.parametrize("position", get_args(Position))
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
    for position in get_args(Position):
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


def test_a_stem_given_twice() -> None:
    with pytest.raises(InputError, match=r"stem=ConvStem contradicts ResNetConfig\(layers=\(1, 1\), .*; pass one of them"):
        VisionTransformer(replace(TINY, stem=ResNetConfig((1, 1)), patch_size=1), stem=ConvStem())


def test_modules_of_ones_own_keep_their_weights_and_cannot_be_saved(tmp_path: Path) -> None:
    """The configuration does not describe them, so that nothing could build the model again."""
    stem = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.Linear(6, 6))
    stem[1].weight.data.fill_(7)
    model = VisionTransformer(TINY, stem=stem)
    assert (stem[1].weight == 7).all()
    with pytest.raises(InputError, match=r"does not describe its Sequential; save its state_dict\(\) instead"):
        save_model(model, tmp_path / "mine.safetensors")
    with pytest.raises(InputError, match="does not describe its TransformerEncoder"):
        save_model(VisionTransformer(TINY, encoder=torch_encoder()), tmp_path / "mine.safetensors")
    assert not list(tmp_path.iterdir())


def torch_encoder(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, **(dict(batch_first=True) | options))
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def literal_encoder(encoder: Any, x: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
    """PyTorch's post-norm encoder from its own weights: tokens, and attention (layer, batch, head, query, key)."""
    maps = []
    for layer in encoder.layers:
        projected = nn.functional.linear(x, layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias)
        query, key, value = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in projected.chunk(3, dim=-1))
        maps.append(reference.softmax_attention(query, key, 8**-0.5))
        mixed = (torch.from_numpy(maps[-1]) @ value).transpose(1, 2).flatten(2)
        x = layer.norm1(x + layer.self_attn.out_proj(mixed))
        x = layer.norm2(x + layer.linear2(nn.functional.relu(layer.linear1(x))))
    return x, np.stack(maps)


@torch.no_grad()
def test_an_encoder_of_ones_own_is_measured() -> None:
    """Positions before it, final norm and head after it; attention distances are those of the encoder's own weights."""
    model = randomize(VisionTransformer(replace(TINY, num_registers=1), encoder=torch_encoder())).double()
    assert isinstance(model.encoder, nn.TransformerEncoder)
    assert not len(model.blocks)  # type: ignore[arg-type]
    batch = images(40, 48).double()
    tokens, maps = literal_encoder(model.encoder, model._embed(batch))  # type: ignore[operator]
    torch.testing.assert_close(model.forward_features(batch), model.norm(tokens))  # type: ignore[operator]
    torch.testing.assert_close(model(batch), model.head(model.norm(tokens)[:, 0]))  # type: ignore[operator]
    result = mean_attention_distance(model, batch, device="cpu")
    expected = reference.mean_attention_distance(maps, 5, 6, (8, 8), 2, "renormalize").mean
    np.testing.assert_allclose(result.distance, expected, rtol=1e-5)
    with attention_hooks(model, seen := Assemble(), verify=True):
        model(batch)
    np.testing.assert_allclose(seen.attention(), maps, atol=1e-6)
    assert seen.names == {0: "encoder.layers.0.self_attn", 1: "encoder.layers.1.self_attn"}


def test_an_encoder_of_ones_own_keeps_its_weights_and_trains() -> None:
    encoder = torch_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    model = VisionTransformer(TINY, encoder=encoder)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    model.replace_head(3).double().resize(64).train()
    nn.init.ones_(model.head.weight)  # type: ignore[arg-type]
    assert model(images(64).double()).shape == (2, 3)
    model.forward_features(images(64).double()).square().sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if not name.startswith("head"))


@pytest.mark.parametrize("pooling", ["token", "avg", "token+avg"])
def test_a_new_head_has_the_type_and_width_of_what_it_sees(pooling: str) -> None:
    for norm_pooled in (False, True):
        config = replace(TINY, pooling=pooling, norm_pooled=norm_pooled)  # type: ignore[arg-type]
        model = VisionTransformer(config, encoder=nn.Identity()).double().replace_head(3)
        assert model.head.weight.dtype == torch.float64  # type: ignore[union-attr]
        assert model(images(48).double()).shape == (2, 3)


def test_contradicting_an_encoder_of_ones_own() -> None:
    encoder = torch_encoder()
    for position in ("relative", "rope_2d"):
        with pytest.raises(
            InputError,
            match=rf"position '{position}' lives in .* which encoder=TransformerEncoder replaces; choose a position embedding",
        ):
            VisionTransformer(replace(TINY, position=position), encoder=encoder)
    with pytest.raises(
        InputError,
        match=r"head_dim, qk_norm of the configuration describe .* encoder=TransformerEncoder replaces; leave them at their",
    ):
        VisionTransformer(replace(TINY, head_dim=4, qk_norm=True), encoder=encoder)
    with pytest.raises(InputError, match=r"takes \(token, batch, dim\); build its layers with batch_first=True"):
        VisionTransformer(TINY, encoder=torch_encoder(batch_first=False))
    with pytest.raises(InputError, match=r"mask= reaches .* this model's encoder is a TransformerEncoder; leave mask out"):
        VisionTransformer(TINY, encoder=encoder)(images(48), mask=torch.ones(37, 37, dtype=torch.bool))


def test_an_encoder_that_returns_something_else() -> None:
    with pytest.raises(InputError, match=r"it is given, \(2, 37, 32\); Linear returned shape \(2, 37, 5\)"):
        VisionTransformer(TINY, encoder=nn.Linear(32, 5))(images(48))
    recurrent = nn.LSTM(32, 32, batch_first=True)
    with pytest.raises(InputError, match=r"it is given, \(2, 37, 32\); LSTM returned a tuple"):
        VisionTransformer(TINY, encoder=recurrent)(images(48))


@torch.no_grad()
def test_heads_of_another_width() -> None:
    """Queries, keys and values of 5 channels in each of 3 heads, though 32 is no multiple of 3."""
    model = tiny(num_heads=3, head_dim=5, depth=1).double()
    layer: Any = model.blocks[0].attn  # type: ignore[union-attr]
    assert (layer.qkv.weight.shape, layer.proj.weight.shape) == ((45, 32), (32, 15))
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    query, key, value = (part.reshape(2, 9, 3, 5).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=-1))
    attention = torch.from_numpy(reference.softmax_attention(query, key, 5**-0.5))
    torch.testing.assert_close(layer(x), layer.proj((attention @ value).transpose(1, 2).reshape(2, 9, 15)))
    assert model(images(48).double()).shape == (2, 7)


@torch.no_grad()
def test_configurations_saved_without_the_newer_fields_still_load(tmp_path: Path) -> None:
    model = tiny()
    path = save_model(model, tmp_path / "mine.safetensors")
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["vit_probe.model"])
    del content["config"]["head_dim"]
    save_file(model.state_dict(), path, metadata={"vit_probe.model": json.dumps(content)})
    again = load_model(path)
    assert again.config == model.config
    assert torch.equal(again(images(48)), model(images(48)))
    wide = tiny(num_heads=3, head_dim=5)
    again = load_model(save_model(wide, tmp_path / "wide.safetensors"))
    assert again.config == wide.config
    assert torch.equal(again(images(48)), wide(images(48)))


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
