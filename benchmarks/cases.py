"""The cases: models, numbers of tokens, images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

__all__ = ["CASES", "Case", "quick"]

_NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Case:
    """A Vision Transformer with a class token, and images for it.

    Args:
        name: Name for `--case` and the tables.
        embed_dim: Dimension of the tokens.
        depth: Number of layers.
        num_heads: Heads per layer.
        side: Patches along each side of an image.
        images: Number of images.
        batch_size: Images per forward pass, and per repeat.
        patch_size: Side of a patch, in pixels.
        left_out: Methods that are run only if they are named, each with the reason.
    """

    name: str
    embed_dim: int
    depth: int
    num_heads: int
    side: int
    images: int
    batch_size: int
    patch_size: int = 16
    left_out: Mapping[str, str] = field(default_factory=lambda: _NONE, hash=False)

    @property
    def image_size(self) -> int:
        """Side of an image, in pixels."""
        return self.side * self.patch_size

    @property
    def num_tokens(self) -> int:
        """Number of patches, plus one for the class token."""
        return self.side**2 + 1

    def title(self) -> str:
        """The case in words."""
        images = "1 image" if self.images == 1 else f"{self.images} images"
        return (
            f"{self.depth} layers, {self.num_heads} heads, width {self.embed_dim}; {self.side**2:,} patches and a class token "
            f"({self.image_size} px, patches of {self.patch_size} px); {images}, {self.batch_size} per batch and repeat"
        )


_BASE = Case("base-196", embed_dim=768, depth=12, num_heads=12, side=14, images=128, batch_size=16)
_SMALL = replace(_BASE, name="small-196", embed_dim=384, num_heads=6, images=64)
CASES = {
    case.name: case
    for case in (
        _BASE,
        _SMALL,
        replace(_SMALL, name="small-784", side=28, images=8, batch_size=4),
        replace(_SMALL, name="small-1369", side=37, images=4, batch_size=2),
        replace(_SMALL, name="small-4096", side=64, images=1, batch_size=1),
        replace(_SMALL, name="small-16384", side=128, images=1, batch_size=1),
    )
}
"""ViT-B/16 at 224 pixels as in the ViT paper, and ViT-S/16 with up to 16,384 patches (1,369 is DINOv2's grid at 518 pixels)."""

_QUICK_PATCHES = 1369
_QUICK_IMAGES = 4


def quick(case: Case) -> Case | None:
    """The case with few images, to try the program out; None if even these take long."""
    if case.side**2 > _QUICK_PATCHES:
        return None
    images = min(case.images, _QUICK_IMAGES)
    return replace(case, images=images, batch_size=min(case.batch_size, images))
