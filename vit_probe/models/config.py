"""The configuration of a Vision Transformer, and the sizes that the papers name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from math import isfinite
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_type_hints

from vit_probe.errors import InputError

__all__ = ["VARIANTS", "ResNetConfig", "Variant", "ViTConfig"]

Pooling = Literal["token", "avg", "token+avg", "distilled"]
Position = Literal["none", "learned_1d", "learned_2d", "sincos_2d", "relative", "rope_2d"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"]
Resampling = Literal["bicubic-antialias", "bicubic", "bicubic-align-corners"]


@dataclass(frozen=True)
class ResNetConfig:
    """The BiT ResNet in front of a hybrid ViT.

    Args:
        layers: Residual units of each stage. The paper's R50 for a 16-pixel grid is `(3, 4, 9)`: the
            units of the fourth stage moved to the third, which leaves out one halving of the feature map.
        width: Channels of the root convolution; the stages' outputs have 4, 8, 16, ... times as many.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1 and appendix B.1;
        Kolesnikov et al. 2020 (BiT), arXiv:1912.11370.

    Examples:
        >>> resnet = ResNetConfig(layers=(3, 4, 9))
        >>> resnet.stride, resnet.out_channels
        (16, 1024)
    """

    layers: tuple[int, ...]
    width: int = 64

    def __post_init__(self) -> None:
        if not all(_is_int(number) and number >= 1 for number in (*self.layers, self.width)):
            raise InputError(f"the layers and the width of a ResNet must be positive ints, got {self.layers} and {self.width}")

    @property
    def stride(self) -> int:
        """Pixels between neighbouring cells of the feature map: 4 after the root, doubled by every stage after the first."""
        return 4 * 2 ** max(len(self.layers) - 1, 0)

    @property
    def out_channels(self) -> int:
        """Channels of the feature map."""
        return self.width * 4 * 2 ** (len(self.layers) - 1) if self.layers else self.width


@dataclass(frozen=True)
class ViTConfig:
    """The architecture of a `VisionTransformer`.

    Args:
        image_size: Native input size in pixels, one side or (height, width).
        patch_size: Patch size in pixels, one side or (height, width); with a hybrid stem, in cells of its feature map.
        in_channels: Colour channels of the input.
        embed_dim: Width of the tokens.
        depth: Number of transformer layers.
        num_heads: Attention heads per layer; must divide `embed_dim` unless `head_dim` is given.
        head_dim: Width of the queries, keys and values of one head; None for `embed_dim` / `num_heads`.
        mlp_ratio: Hidden width of the MLP divided by `embed_dim` (for SwiGLU, of each of its two halves).
        num_classes: Outputs of the head; 0 for no head, in which case the model returns pooled features.
        class_token: Whether the sequence starts with a class token.
        distillation_token: Whether a distillation token follows the class token (DeiT, arXiv:2012.12877).
        num_registers: Number of register tokens, between those and the patches (Darcet et al. 2024, arXiv:2309.16588).
        pooling: The head's input: the class `token`; `avg`, the mean of the patch tokens; `token+avg`, both concatenated
            (DINOv2's linear heads); or `distilled`, the mean of one head on the class token and another on the
            distillation token.
        position: Position embedding. Added to the tokens: `learned_1d` (the usual table), `learned_2d` (a row and a column
            table, each of half the width) or `sincos_2d` (fixed). In the attention of every layer: `relative` (one
            embedding per raster-order offset, see `RelativePosition`) or `rope_2d` (axial rotary embedding, see
            `rotate_by_position`). Or `none`.
        position_prefix: Number of prefix tokens, counted from the first, that the position table covers; None for all.
        position_resampling: How the `learned_1d` table is interpolated for another grid: timm's antialiased bicubic, the
            plain bicubic of transformers (and its DINOv2), or torchvision's with aligned corners. DINOv2's original code
            interpolates with an offset (`interpolate_offset=0.1`), which no choice reproduces: it moves the position embeddings
            by up to 6.5 % at 224 pixels.
        qkv_bias: Whether the query, key and value projections have a bias.
        qk_norm: Whether the queries and keys of each head are normalised by a LayerNorm.
        layer_scale: Initial value of LayerScale (arXiv:2103.17239); None for no LayerScale.
        dropout: Dropout rate after position embeddings, attention projections and MLP layers.
        drop_path: Stochastic depth (Huang et al. 2016, arXiv:1603.09382): probability, in training, of dropping a residual
            branch of the last layer for an image; it grows linearly from 0 in the first layer.
        norm_eps: Epsilon of every LayerNorm.
        activation: `gelu`, `gelu_tanh` (its tanh approximation, as in SigLIP), `quick_gelu` (CLIP's x * sigmoid(1.702 x)) or
            `swiglu`.
        patch_bias: Whether the patch projection has a bias.
        pre_norm: Whether a LayerNorm precedes the first layer (CLIP).
        norm_pooled: Whether the final LayerNorm follows the pooling (timm's `fc_norm`) instead of preceding it.
        stem: The ResNet of a hybrid model; None for patches of pixels.

    Raises:
        InputError: If a value is out of range, or two of them contradict each other.

    Examples:
        >>> config = ViTConfig(image_size=224, patch_size=16, num_registers=4)
        >>> config.grid_size(224, 224), config.num_prefix_tokens
        ((14, 14), 5)
        >>> ViTConfig.variant("S/16", num_classes=10).embed_dim
        384
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    in_channels: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    head_dim: int | None = None
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    class_token: bool = True
    distillation_token: bool = False
    num_registers: int = 0
    pooling: Pooling = "token"
    position: Position = "learned_1d"
    position_prefix: int | None = None
    position_resampling: Resampling = "bicubic-antialias"
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    norm_eps: float = 1e-6
    activation: Activation = "gelu"
    patch_bias: bool = True
    pre_norm: bool = False
    norm_pooled: bool = False
    stem: ResNetConfig | None = None

    def __post_init__(self) -> None:
        for name, hint in _HINTS.items():
            _check_type(name, getattr(self, name), get_args(hint) or (hint,))
        for name in ("image_size", "patch_size"):
            object.__setattr__(self, name, as_pair(getattr(self, name), name))
        for name in ("in_channels", "embed_dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_classes", "num_registers"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.norm_eps < 1 or self.mlp_ratio <= 0:
            raise InputError(
                f"norm_eps must lie between 0 and 1, and mlp_ratio above 0; got {self.norm_eps} and {self.mlp_ratio}"
            )
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be a rate from 0 to below 1, got {getattr(self, name)}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        if self.head_dim is not None and self.head_dim < 1:
            raise InputError(f"head_dim must be at least 1, or None for embed_dim / num_heads; got {self.head_dim}")
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise InputError(
                f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}; change one, or set head_dim"
            )
        self.grid_size(*as_pair(self.image_size, "image_size"))
        if self.pooling in ("token", "token+avg", "distilled") and not self.class_token:
            raise InputError(f"pooling {self.pooling!r} needs a class token; set class_token=True or pooling='avg'")
        if self.pooling == "distilled" and not self.distillation_token:
            raise InputError("pooling 'distilled' needs a distillation token; set distillation_token=True")
        if self.position == "sincos_2d" and self.embed_dim % 4:
            raise InputError(f"position 'sincos_2d' needs an embed_dim divisible by 4, got {self.embed_dim}")
        if self.position == "learned_2d" and self.embed_dim % 2:
            raise InputError(f"position 'learned_2d' needs an even embed_dim, got {self.embed_dim}")
        if self.position == "rope_2d" and self.dim_per_head % 4:
            raise InputError(
                f"position 'rope_2d' needs a head_dim divisible by 4, got {self.dim_per_head}; "
                "change embed_dim or num_heads, or set head_dim"
            )
        if not 0 <= self.num_position_prefix_tokens <= self.num_prefix_tokens:
            raise InputError(
                f"position_prefix must lie between 0 and the number of prefix tokens, {self.num_prefix_tokens}; "
                f"got {self.position_prefix}"
            )

    @property
    def dim_per_head(self) -> int:
        """Width of the queries, keys and values of one head."""
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class token, distillation token, registers."""
        return int(self.class_token) + int(self.distillation_token) + self.num_registers

    @property
    def num_position_prefix_tokens(self) -> int:
        """Prefix tokens that the position table covers."""
        return self.num_prefix_tokens if self.position_prefix is None else self.position_prefix

    @property
    def patch_stride(self) -> tuple[int, int]:
        """Height and width in pixels of the image region of one patch token; with a stem, of one patch of its feature map."""
        height, width = as_pair(self.patch_size, "patch_size")
        stride = self.stem.stride if self.stem else 1
        return height * stride, width * stride

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image of `height` by `width` pixels.

        Raises:
            InputError: If the image does not divide into whole patches.
        """
        patch_height, patch_width = self.patch_stride
        if height < 1 or width < 1 or height % patch_height or width % patch_width:
            raise InputError(
                f"an image of {height} x {width} pixels does not divide into patches of {patch_height} x {patch_width}; "
                "resize or crop it to a multiple of the patch size"
            )
        return height // patch_height, width // patch_width

    @classmethod
    def variant(cls, name: str, **overrides: Any) -> ViTConfig:
        """The configuration of a named size, such as `"B/16"`, `"ViT-L/32"` or the hybrid `"R50+B/16"`.

        Args:
            name: A size of `VARIANTS`, a slash and the patch size in pixels; for a hybrid, preceded by `R26+` or `R50+`.
            overrides: Fields of `ViTConfig` to set to other values.

        Raises:
            InputError: If the name is unknown, or an override is not a field of `ViTConfig`.
        """
        match = re.fullmatch(r"(?:(R26|R50)\+)?(?:ViT-)?([A-Za-z]+)/(\d+)", name)
        if match is None or match[2] not in VARIANTS:
            sizes = ", ".join(f"{size}/16" for size in VARIANTS)
            raise InputError(f"no ViT variant is called {name!r}; names are {sizes}, any patch size, or R50+B/16 for a hybrid")
        check_fields(overrides)
        size, patch = VARIANTS[match[2]], int(match[3])
        config: dict[str, Any] = dict(
            embed_dim=size.width, depth=size.layers, num_heads=size.heads, mlp_ratio=size.mlp / size.width, patch_size=patch
        )
        if match[1]:
            key = (match[1], patch)
            if key not in _RESNET_LAYERS:
                known = ", ".join(f"{resnet} with /{stride}" for resnet, stride in _RESNET_LAYERS)
                raise InputError(f"{name!r} is not a hybrid of the papers; known are {known}")
            config |= dict(stem=ResNetConfig(_RESNET_LAYERS[key]), patch_size=1)
        return cls(**(config | overrides))


@dataclass(frozen=True)
class Variant:
    """A named size, as the papers' tables give it."""

    layers: int
    width: int
    mlp: int
    heads: int


# Ti and S: Touvron et al. 2021 (DeiT), arXiv:2012.12877, table 1, and Steiner et al. 2022, arXiv:2106.10270, table 2.
# B, L, H: Dosovitskiy et al. 2021, arXiv:2010.11929, table 1. g and G: Zhai et al. 2022, arXiv:2106.04560, table 2.
VARIANTS: dict[str, Variant] = {
    "Ti": Variant(layers=12, width=192, mlp=768, heads=3),
    "S": Variant(layers=12, width=384, mlp=1536, heads=6),
    "B": Variant(layers=12, width=768, mlp=3072, heads=12),
    "L": Variant(layers=24, width=1024, mlp=4096, heads=16),
    "H": Variant(layers=32, width=1280, mlp=5120, heads=16),
    "g": Variant(layers=40, width=1408, mlp=6144, heads=16),
    "G": Variant(layers=48, width=1664, mlp=8192, heads=16),
}

# arXiv:2010.11929, appendix B.1 (R50 with a 16-pixel grid); arXiv:2106.10270, section 3.1 (R26 and R50 with 32).
_RESNET_LAYERS = {("R50", 16): (3, 4, 9), ("R26", 32): (2, 2, 2, 2), ("R50", 32): (3, 4, 6, 3)}

_HINTS = get_type_hints(ViTConfig)
_CHOICES = {
    name: get_args(hint)
    for name, hint in _HINTS.items()
    if name in ("pooling", "position", "position_resampling", "activation")
}


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_type(name: str, value: Any, kinds: tuple[Any, ...]) -> None:
    """Check a number or a switch, which may come from a file: "0", 0.0 and False are three different things there."""
    if (value is None and type(None) in kinds) or not {bool, int, float} & set(kinds) or tuple[int, int] in kinds:
        return
    if bool in kinds:
        expected, valid = "True or False", isinstance(value, bool)
    elif int in kinds:
        expected, valid = "an int", _is_int(value)
    else:
        expected, valid = "a finite number", isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
    if not valid:
        raise InputError(f"{name} must be {expected}, got {value!r}")


def as_pair(size: int | tuple[int, int], name: str) -> tuple[int, int]:
    """(height, width) from one side or both.

    Args:
        size: A side or a pair of sides.
        name: What the error message calls it.

    Raises:
        InputError: If `size` is neither a positive integer nor a pair of positive integers.

    Examples:
        >>> as_pair(16, "patch_size")
        (16, 16)
    """
    pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(pair) != 2 or not all(_is_int(side) and side >= 1 for side in pair):
        raise InputError(f"{name} must be a positive int or a pair (height, width) of them, got {size!r}")
    return pair[0], pair[1]


def check_fields(overrides: Iterable[str]) -> None:
    """Raise InputError unless every name is a field of `ViTConfig`."""
    unknown = sorted(set(overrides) - {field.name for field in fields(ViTConfig)})
    if unknown:
        raise InputError(f"ViTConfig has no field {', '.join(unknown)}")
