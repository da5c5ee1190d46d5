"""What a test needs to know of a family of models: how to build one, what it is shown, and the library's own attention."""

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
    """What a library computes without fused attention.

    Args:
        maps: By module path, softmax weights (image or window, head, query, key).
        output: Of the whole model.
    """

    maps: dict[str, Tensor]
    output: Tensor


@dataclass(frozen=True)
class Placed:
    """Where a library's own code puts the patches of a layer with windows.

    Args:
        rows, cols: Patches of this layer.
        patch_size: Height and width of one, in pixels.
        patches: (window, token) number of the patch, counted row by row; -1 for padding.
        masked_pairs: (window, query, key) what must not be seen; None where the layer has no mask.
    """

    rows: int
    cols: int
    patch_size: tuple[int, int]
    patches: Tensor
    masked_pairs: Tensor | None = None


@dataclass(frozen=True)
class Family:
    """A family of Vision Transformers of one library, as users know it.

    Args:
        library: Its name, as it is imported.
        name: Of the family.
        build: A small model for images of this height and width.
        unfused: The library's own attention, computed without `scaled_dot_product_attention`.
        layers: Module path of each self-attention layer.
        sizes: Images to try; the first is the usual one.
        patch_size: Height and width of a patch, in pixels.
        num_prefix_tokens: Tokens before the patches.
        has_cls_token: Whether one of them is a class token.
        skipped: Attention that is not self-attention, with the reason.
        windows: What the library's own partition says of the layers with windows, for images of this size.
        listed: Whether README's table has it; what only a test needs is not there.
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
    windows: Callable[[nn.Module, Size], dict[int, Placed]] = lambda model, size: {}
    listed: bool = True

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    def model(self, size: Size | None = None) -> nn.Module:
        """In evaluation mode, with weights far from those of a fresh model."""
        torch.manual_seed(0)
        return randomize(self.build(size or self.sizes[0]))

    def images(self, size: Size | None = None, batch: int = 2) -> Tensor:
        return images(*(size or self.sizes[0]), batch=batch)

    def grid(self, size: Size | None = None) -> TokenGrid:
        height, width = size or self.sizes[0]
        rows, cols = height // self.patch_size[0], width // self.patch_size[1]
        return TokenGrid(rows, cols, self.patch_size, self.num_prefix_tokens, self.has_cls_token)


def blocks(pattern: str, depth: int = 2) -> tuple[str, ...]:
    """The paths of `depth` layers."""
    return tuple(pattern.format(layer) for layer in range(depth))


def numbered(rows: int, cols: int) -> Tensor:
    """Each patch's number from 1, (1, row, col, 1); a library's partition pads it with 0."""
    return torch.arange(1.0, rows * cols + 1).view(1, rows, cols, 1)


def unnumbered(windows: Tensor) -> Tensor:
    """The numbers after the library's partition, (window, token): counted from 0, padding -1."""
    return windows.flatten(1).long() - 1
