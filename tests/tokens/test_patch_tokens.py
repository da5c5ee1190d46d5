"""patch_tokens and block_path: the tokens between the layers of every family."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.attention.test_hooks import leaves_nothing
from tests.example_models import FAMILIES, images, small_vit
from vit_probe import InputError
from vit_probe.tokens.hidden_states import block_path, patch_tokens
from vit_probe.tokens.locate import locate_tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_of_every_family_in_order(name: str) -> None:
    """The blocks are called one after the other, and each holds its attention and a normalisation."""
    family = FAMILIES[name]
    model = family.model()
    layout = locate_tokens(model, *family.size)
    paths = [block_path(model, layout, layer) for layer in range(2)]
    order: list[str] = []
    for path in paths:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: order.append(path))
    with torch.no_grad():
        model(family.images(1))
    assert order == paths
    for layer, path in enumerate(paths):
        assert layout.layers[layer].startswith(f"{path}.")
        assert any(isinstance(module, nn.LayerNorm) for module in model.get_submodule(path).modules())


@pytest.mark.parametrize("name", ["ours", "timm-registers", "torchvision", "encoder"])
@pytest.mark.parametrize("after_layers", [0, 1, 2])
def test_tokens_are_the_outputs_of_the_blocks(name: str, after_layers: int) -> None:
    family = FAMILIES[name]
    model, x = family.model(), family.images(2)
    layout = locate_tokens(model, *family.size)
    passed: list[Tensor] = []
    first = model.get_submodule(block_path(model, layout, 0))
    first.register_forward_pre_hook(lambda module, args: passed.append(args[0]))
    for layer in range(2):
        block = model.get_submodule(block_path(model, layout, layer))
        block.register_forward_hook(lambda module, args, output: passed.append(output))
    with torch.no_grad():
        model(x)
    passed = passed[:3]
    with leaves_nothing(model):
        tokens, grid = patch_tokens(model, x, layout, after_layers)
    assert grid == family.grid
    torch.testing.assert_close(tokens, passed[after_layers][:, grid.num_prefix_tokens :])


def test_training_mode_and_gradients_are_left_alone() -> None:
    model = small_vit(dropout=0.5).train()
    tokens, _ = patch_tokens(model, images(), locate_tokens(model, 24, 24), 2)
    again, _ = patch_tokens(model, images(), locate_tokens(model, 24, 24), 2)
    assert torch.equal(tokens, again)
    assert not tokens.requires_grad
    assert model.training


def test_the_block_of_a_single_layer() -> None:
    """Not the encoder around it, which holds the final norm in torchvision's models and adds the positions."""
    from torchvision.models import VisionTransformer

    model = small_vit(depth=1)
    assert block_path(model, locate_tokens(model, 24, 24), 0) == "blocks.0"
    sizes = dict(image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32)
    other = VisionTransformer(**sizes).eval()
    assert block_path(other, locate_tokens(other, 32, 32), 0) == "encoder.layers.encoder_layer_0"


def test_the_block_of_a_single_layer_whose_attention_is_in_a_list() -> None:
    """The list is inside the block, whose output passes on."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.Sequential(nn.LayerNorm(8), Shared())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attn(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed, self.blocks, self.norm = nn.Conv2d(3, 8, 8, 8), nn.ModuleList([Block()]), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.blocks[0](self.patch_embed(x).flatten(2).mT[:, None]))

    model = Model().eval()
    assert block_path(model, locate_tokens(model, 24, 24), 0) == "blocks.0"


def test_the_block_of_a_single_layer_without_a_list() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed, self.block = nn.Conv2d(3, 8, 8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.patch_embed(x).flatten(2).mT)

    model = Alone().eval()
    assert block_path(model, locate_tokens(model, 24, 24), 0) == "block"


class Plain(nn.Module):
    """No blocks: the model calls its attention itself, or one module for both layers."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 8, 8)
        self.attn = Shared()
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).mT[:, None]
        return self.attn(self.attn(x)) if self.shared else F.scaled_dot_product_attention(x, x, x)


class Shared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(("shared", "what"), [(True, "attn"), (False, "the model itself")])
def test_layers_without_a_block_of_their_own(shared: bool, what: str) -> None:
    model = Plain(shared=shared)
    layout = locate_tokens(model, 24, 24)
    with pytest.raises(InputError, match=rf"layer 0 \({what}\) of Plain has no block of its own"):
        patch_tokens(model, images(), layout, 1)


def test_blocks_that_return_something_else() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed, self.attn = nn.Conv2d(3, 8, 8, 8), Shared()

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(self.patch_embed(x).flatten(2).mT[:, None])

    model = Transposed()
    layout = locate_tokens(model, 24, 24)
    with pytest.raises(
        InputError, match=r"the block around attn returns a tensor of shape \(3, 1, 9, 8\), which does not hold"
    ):
        patch_tokens(model, images(), layout, 1)


class Pairs(nn.Module):
    """Layers that are lists of modules, whose outputs the model adds to the tokens, as in vit-pytorch."""

    def __init__(self, *, depth: int, norms: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed, self.scale = nn.Conv2d(3, 8, 8, 8), scale
        self.layers = nn.ModuleList([nn.ModuleList(self._branches(norms)) for _ in range(depth)])
        self.norm = nn.LayerNorm(8)

    def _branches(self, norms: bool) -> list[nn.Module]:
        attention, mlp = nn.Sequential(nn.LayerNorm(8), Single()), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        return [*attention, *mlp] if norms else [attention, mlp]

    def tokens(self, x: Tensor) -> list[Tensor]:
        """Those that enter the first layer, and those after each layer."""
        tokens = [self.patch_embed(x).flatten(2).mT]
        for modules in self.layers:
            x = tokens[-1]
            half = len(modules) // 2
            for branch in (modules[:half], modules[half:]):
                y = x
                for module in branch:
                    y = module(y)
                x = self.scale * x + y
            tokens.append(x)
        return tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.tokens(x)[-1])


class Single(nn.Module):
    """Attention of a single head."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_layers_that_are_lists_of_branches(depth: int, norms: bool) -> None:
    """The final normalisation is not part of the last layer."""
    model, x = Pairs(depth=depth, norms=norms).eval(), images(batch=2)
    layout = locate_tokens(model, 24, 24)
    assert [block_path(model, layout, layer) for layer in range(depth)] == [f"layers.{layer}" for layer in range(depth)]
    with torch.no_grad():
        expected = model.tokens(x)
    for after_layers in range(depth + 1):
        with leaves_nothing(model):
            tokens, _ = patch_tokens(model, x, layout, after_layers)
        torch.testing.assert_close(tokens, expected[after_layers], rtol=0, atol=0)
    for one, other in pairwise(expected):
        assert float((one - other).abs().mean()) > 0.1


def test_branches_that_are_not_simply_added() -> None:
    model = Pairs(depth=2, scale=0.5).eval()
    layout = locate_tokens(model, 24, 24)
    with leaves_nothing(model), pytest.raises(InputError, match=r"what follows the modules around layers.0.0.1 gets neither"):
        patch_tokens(model, images(), layout, 1)


def test_a_branch_is_not_taken_for_the_tokens() -> None:
    """The block's output is only the attention, which the model adds to the tokens; the next block shows it."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed, self.attentions = nn.Conv2d(3, 8, 8, 8), nn.ModuleList([Single(), Single()])

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch_embed(x).flatten(2).mT
            for attention in self.attentions:
                x = x + attention(x)
            return x

    model = Residual()
    with pytest.raises(InputError, match=r"the block around attentions.1 does not take the tokens from the block before it"):
        patch_tokens(model, images(), locate_tokens(model, 24, 24), 1)


class SeqFirst(nn.Module):
    """Two blocks of torch that put the tokens before the images."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 8, 8)
        blocks = [nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, norm_first=True) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x).flatten(2).permute(2, 0, 1)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


@pytest.mark.parametrize("count", [1, 4, 9, 12])
def test_tokens_before_images(count: int) -> None:
    """Also if a batch has as many images as there are tokens (nine), so that the shape does not tell which come first."""
    torch.manual_seed(0)
    model, x = SeqFirst().eval(), images(batch=count)
    layout = locate_tokens(model, 24, 24)
    assert {"blocks.0", "blocks.1"} <= layout.seq_first
    with torch.no_grad():
        expected = model(x).transpose(0, 1)
    tokens, _ = patch_tokens(model, x, layout, 2)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)


def test_images_before_tokens_though_as_many() -> None:
    model = small_vit()
    layout = locate_tokens(model, 24, 24)
    assert not layout.seq_first
    x = images(batch=layout.grid.num_tokens)
    tokens, _ = patch_tokens(model, x, layout, 2)
    first, _ = patch_tokens(model, x[:1], layout, 2)
    torch.testing.assert_close(tokens[:1], first, rtol=0, atol=1e-5)
