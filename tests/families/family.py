"""Model families for tests: how to build a small model, its input images, and the library's own attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tests.checkpoints.parity import randomize
from tests.example_models import images
from vit_probe import TokenGrid

Size = tuple[int, int]


@dataclass(frozen=True)
class Unfused:
    """A library's attention weights and output without fused attention.

    Args:
        maps: Softmax weights (image or window, head, query, key) by module path.
        output: Output of the whole model.
    """

    maps: dict[str, Tensor]
    output: Tensor


@dataclass(frozen=True)
class WindowLayout:
    """Where the patches of a layer with windows lie, according to the library's own code.

    Args:
        rows: Rows of patches in this layer.
        cols: Columns of patches in this layer.
        patch_size: Height and width of a patch in pixels.
        patches: Index of each token's patch, row by row: (window, token); -1 for padding.
        masked_pairs: Which pairs the layer's mask excludes: (window, query, key); None if the layer has no mask.
    """

    rows: int
    cols: int
    patch_size: tuple[int, int]
    patches: Tensor
    masked_pairs: Tensor | None = None


@dataclass(frozen=True)
class Family:
    """A family of Vision Transformers in one library, under the name by which users know it.

    Args:
        library: Name under which the library is imported.
        name: Name of the family.
        build: Builds a small model for images of a height and width.
        unfused: Computes the library's own attention without `scaled_dot_product_attention`.
        layers: Module path of each self-attention layer.
        sizes: Image sizes to test; the first is the default.
        patch_size: Height and width of a patch in pixels.
        num_prefix_tokens: Number of tokens before the patches.
        has_cls_token: Whether one of them is a class token.
        skipped: Module paths of attention that is not self-attention, with the reason.
        windows: Returns the layout of each layer with windows according to the library's own partition, by layer number.
        in_readme: Whether the README's table has a row for it; variants that only matter to tests have none.
    """

    library: str
    name: str
    build: Callable[[Size], nn.Module]
    unfused: Callable[[nn.Module, Tensor, tuple[str, ...]], Unfused]
    layers: tuple[str, ...]
    sizes: tuple[Size, ...]
    patch_size: tuple[int, int] = (8, 8)
    num_prefix_tokens: int = 1
    has_cls_token: bool = True
    skipped: Mapping[str, str] = field(default_factory=dict)
    windows: Callable[[nn.Module, Size], dict[int, WindowLayout]] = lambda model, size: {}
    in_readme: bool = True

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    def model(self, size: Size | None = None) -> nn.Module:
        """A small model in evaluation mode, with weights far from their initial values."""
        torch.manual_seed(0)
        return randomize(self.build(size or self.sizes[0]))

    def images(self, size: Size | None = None, batch: int = 2) -> Tensor:
        return images(*(size or self.sizes[0]), batch=batch)

    def grid(self, size: Size | None = None) -> TokenGrid:
        height, width = size or self.sizes[0]
        rows, cols = height // self.patch_size[0], width // self.patch_size[1]
        return TokenGrid(rows, cols, self.patch_size, self.num_prefix_tokens, self.has_cls_token)


def blocks(pattern: str, depth: int = 2) -> tuple[str, ...]:
    """Module paths of `depth` layers."""
    return tuple(pattern.format(layer) for layer in range(depth))


def patch_numbers(rows: int, cols: int) -> Tensor:
    """Each patch's number from 1, shape (1, row, col, 1), to pass through a library's partition, which pads with 0."""
    return torch.arange(1.0, rows * cols + 1).view(1, rows, cols, 1)


def patch_indices(windows: Tensor) -> Tensor:
    """Each token's patch index from 0, shape (window, token), from the partitioned numbers; padding becomes -1."""
    return windows.flatten(1).long() - 1
