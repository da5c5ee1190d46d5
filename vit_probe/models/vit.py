"""The Vision Transformer, with timm's module and parameter names, so that timm's state dicts load as they are.

Axes, here and everywhere in the package: `batch layer head query key token patch row col channel dim`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vit_probe.errors import InputError
from vit_probe.models.config import ViTConfig, as_pair
from vit_probe.models.layers import Block, Mask
from vit_probe.models.patch_embed import HybridEmbed, PatchEmbed
from vit_probe.models.position_embedding import (
    LearnedPosition2d,
    PatchPositions,
    resize_position_embedding,
    sincos_position_embedding,
)
from vit_probe.models.relative_position import RelativePosition
from vit_probe.tokens.grid import TokenGrid

if TYPE_CHECKING:
    from vit_probe.data.preprocessing import Preprocessing

__all__ = ["VisionTransformer"]

# What only the model's own layers are built from, and `ViTConfig.variant` does not set.
_LAYER_FIELDS = ("head_dim", "qkv_bias", "qk_norm", "layer_scale", "drop_path", "activation")


class VisionTransformer(nn.Module):
    """The Vision Transformer of a `ViTConfig`.

    Takes images of any size that divides into patches. For a grid other than the native one, position tables are
    interpolated in the forward pass; `resize` interpolates them permanently, for fine-tuning.

    Args:
        config: The architecture.
        stem: Replaces the patch embedding: a module that maps images (batch, channel, height, width) to a feature map
            (batch, embed_dim, row, col), whose cells become the tokens; one cell stands for `config.patch_size` pixels.
        encoder: Replaces the transformer layers: a module that maps tokens (batch, token, embed_dim), prefix tokens first
            and positions added, to tokens of the same shape. The final norm and the head still apply. `depth`,
            `num_heads` and `mlp_ratio` of the configuration then describe nothing that is built.

    Attributes:
        blocks: The transformer layers; empty if `encoder` replaces them.
        preprocessing: How images are prepared for this model; None unless the checkpoint says.
        name: The model's name in results; `load_model` sets it to the checkpoint's.

    Raises:
        InputError: If the configuration and a module given in place of a part of it contradict each other.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 3 and figure 1.

    Examples:
        >>> config = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)
        >>> model = VisionTransformer(config).eval()
        >>> model(torch.rand(2, 3, 32, 48)).shape
        torch.Size([2, 5])

        An encoder of one's own, here PyTorch's:

        >>> layer = nn.TransformerEncoderLayer(24, nhead=3, dim_feedforward=96, batch_first=True, norm_first=True)
        >>> encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        >>> VisionTransformer(config, encoder=encoder).forward_features(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 17, 24])
    """

    head: nn.Module
    head_dist: nn.Module

    def __init__(self, config: ViTConfig, *, stem: nn.Module | None = None, encoder: nn.Module | None = None) -> None:
        super().__init__()
        if not isinstance(config, ViTConfig):
            got = repr(config) if isinstance(config, str) else type(config).__name__
            raise InputError(
                f"the configuration must be a ViTConfig, got {got}; pass ViTConfig.variant('B/16'), for example, or "
                "ViTConfig(...)"
            )
        if stem is not None and config.stem is not None:
            raise InputError(f"stem={type(stem).__name__} contradicts {config.stem} of the configuration; pass one of them")
        if encoder is not None:
            _check_encoder(encoder, config)
        self.config = config
        self.preprocessing: Preprocessing | None = None
        self.name = "VisionTransformer"
        dim = config.embed_dim
        self.patch_embed: nn.Module = HybridEmbed(config) if config.stem else PatchEmbed(config) if stem is None else stem
        self.cls_token = _token(1, dim) if config.class_token else None
        self.dist_token = _token(1, dim) if config.distillation_token else None
        self.reg_token = _token(config.num_registers, dim) if config.num_registers else None
        self.pos_embed: Any = self._new_position_embedding()
        self.pos_drop = nn.Dropout(config.dropout)
        self.norm_pre = nn.LayerNorm(dim, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        self.encoder = encoder
        rates = [config.drop_path * layer / max(config.depth - 1, 1) for layer in range(config.depth)]
        self.blocks: Any = nn.ModuleList(Block(config, drop_path=rate) for rate in rates if encoder is None)
        pooled_dim = 2 * dim if config.pooling == "token+avg" else dim
        self.norm = nn.Identity() if config.norm_pooled else nn.LayerNorm(dim, eps=config.norm_eps)
        self.fc_norm = nn.LayerNorm(pooled_dim, eps=config.norm_eps) if config.norm_pooled else nn.Identity()
        for module in self.blocks.modules():  # the caller's stem or encoder keeps its weights
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.replace_head(config.num_classes)

    def forward(self, images: Float[Tensor, "batch channel height width"], *, mask: Mask | None = None) -> Tensor:
        """Logits (batch, num_classes), or pooled features (batch, dim) if the model has no head.

        Args:
            images: Preprocessed images.
            mask: Passed to the attention of every layer, and broadcast to (batch, head, query, key): boolean, True where
                a query may attend to a key, or floating-point, added to the scaled scores.

        Raises:
            InputError: If the images have the wrong shape or do not divide into patches, or the model has an encoder of
                the caller's own and a mask is given.
        """
        return self.forward_head(self.forward_features(images, mask=mask))

    def forward_features(
        self, images: Float[Tensor, "batch channel height width"], *, mask: Mask | None = None
    ) -> Float[Tensor, "batch token dim"]:
        """All tokens after the last layer and the final norm, prefix tokens first.

        Args:
            images: Preprocessed images.
            mask: As for `forward`.

        Raises:
            InputError: As for `forward`.
        """
        if images.ndim != 4 or images.shape[1] != self.config.in_channels:
            raise InputError(
                f"this model takes images (batch, {self.config.in_channels}, height, width), got shape {tuple(images.shape)}"
            )
        if mask is not None and self.encoder is not None:
            raise InputError(
                f"mask= reaches the model's own layers only, and this model's encoder is a {type(self.encoder).__name__}; "
                "leave mask out, or let the encoder apply it"
            )
        x = self.norm_pre(self.pos_drop(self._embed(images)))
        if self.encoder is not None:
            return self.norm(self._encode(x, self.encoder))
        grid = self.config.grid_size(images.shape[2], images.shape[3])
        positions = PatchPositions(grid, torch.arange(grid[0] * grid[1], device=images.device))
        for block in self.blocks:
            x = block(x, mask, positions)
        return self.norm(x)

    def forward_head(self, tokens: Float[Tensor, "batch token dim"]) -> Tensor:
        """Logits, or pooled features if the model has no head, from the tokens that `forward_features` returns."""
        pooling = self.config.pooling
        if pooling == "distilled":
            cls, distilled = self.fc_norm(tokens[:, 0]), self.fc_norm(tokens[:, 1])
            return (self.head(cls) + self.head_dist(distilled)) / 2
        pooled = [tokens[:, 0]] if "token" in pooling else []
        if "avg" in pooling:
            pooled.append(tokens[:, self.config.num_prefix_tokens :].mean(dim=1))
        return self.head(self.fc_norm(torch.cat(pooled, dim=-1)))

    def token_grid(self, height: int, width: int) -> TokenGrid:
        """The token grid of an image of `height` by `width` pixels.

        Raises:
            InputError: If the image does not divide into patches.
        """
        config = self.config
        rows, cols = config.grid_size(height, width)
        return TokenGrid(rows, cols, config.patch_stride, config.num_prefix_tokens, config.class_token)

    def position_table(self) -> tuple[Float[Tensor, "patch dim"], int, int] | None:
        """The patches' position embeddings at the native image size, with its rows and columns of patches.

        None if no embedding is added to the tokens: positions `none`, `relative` and `rope_2d`.
        """
        rows, cols = self.config.grid_size(*as_pair(self.config.image_size, "image_size"))
        table = self._position_embedding((rows, cols))
        return None if table is None else (table[0, self.config.num_position_prefix_tokens :], rows, cols)

    def replace_head(self, num_classes: int) -> VisionTransformer:
        """Replaces the head by a zero-initialised linear layer, in place, and returns the model.

        Args:
            num_classes: Outputs of the new head; 0 removes the head.

        Raises:
            InputError: If `num_classes` is negative.

        References:
            Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.2 (fine-tuning).
        """
        if num_classes < 0:
            raise InputError(f"num_classes must be 0 (no head) or more, got {num_classes}")
        config = self.config = replace(self.config, num_classes=num_classes)
        pooled_dim = config.embed_dim * (2 if config.pooling == "token+avg" else 1)
        like: Any = (self.fc_norm if config.norm_pooled else self.norm).weight  # the head's input comes out of this norm
        for name in ("head", "head_dist") if config.pooling == "distilled" else ("head",):
            head: nn.Module = nn.Identity()
            if num_classes:
                head = nn.Linear(pooled_dim, num_classes, device=like.device, dtype=like.dtype)
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
            self.add_module(name, head)
        return self

    def resize(self, image_size: int | tuple[int, int]) -> VisionTransformer:
        """Changes the native image size in place, and returns the model.

        Position tables are interpolated, and `preprocessing`, if the model has one, is scaled accordingly.

        Args:
            image_size: New size in pixels, one side or (height, width).

        Raises:
            InputError: If the size does not divide into patches.

        References:
            Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.2 (fine-tuning at higher resolution).
        """
        config = replace(self.config, image_size=image_size)
        grid = config.grid_size(*as_pair(image_size, "image_size"))
        if isinstance(self.pos_embed, LearnedPosition2d):
            self.pos_embed.resize(grid)
        elif isinstance(self.pos_embed, nn.Parameter):
            with torch.no_grad():
                table = self._position_embedding(grid)
            self.pos_embed = nn.Parameter(table.clone(), requires_grad=self.pos_embed.requires_grad)
        for module in self.modules():
            if isinstance(module, RelativePosition):
                module.resize(grid)
        self.config = config
        if self.preprocessing is not None:
            self.preprocessing = self.preprocessing.scaled(as_pair(image_size, "image_size"))
        return self

    def _embed(self, images: Tensor) -> Tensor:
        """Prefix tokens and patch tokens, with position embeddings added."""
        grid = self.config.grid_size(images.shape[2], images.shape[3])
        features = self.patch_embed(images)
        if features.shape[1:] != (self.config.embed_dim, *grid):
            raise InputError(
                f"the stem returned a map of shape {tuple(features.shape)}; the configuration calls for "
                f"(batch, {self.config.embed_dim}, {grid[0]}, {grid[1]})"
            )
        patches = rearrange(features, "batch dim row col -> batch (row col) dim")
        prefix = [
            token.expand(len(images), -1, -1)
            for token in (self.cls_token, self.dist_token, self.reg_token)
            if token is not None
        ]
        tokens = torch.cat([*prefix, patches], dim=1)
        position = self._position_embedding(grid)
        if position is None:
            return tokens
        # Prefix tokens that the table does not cover, usually registers, get no position embedding.
        covered, uncovered = self.config.num_position_prefix_tokens, self.config.num_prefix_tokens
        position = torch.cat(
            [position[:, :covered], position.new_zeros(1, uncovered - covered, position.shape[2]), position[:, covered:]], 1
        )
        return tokens + position

    def _encode(self, tokens: Tensor, encoder: nn.Module) -> Tensor:
        """The tokens that the caller's encoder returns."""
        out = encoder(tokens)
        if not isinstance(out, Tensor) or out.shape != tokens.shape:
            arrived = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise InputError(
                f"an encoder returns tokens of the shape that it is given, {tuple(tokens.shape)}; "
                f"{type(encoder).__name__} returned {arrived}"
            )
        return out

    def _position_embedding(self, grid: tuple[int, int]) -> Any:
        """The table for `grid` (1, token, dim), entries of prefix tokens first; None if nothing is added to the tokens."""
        config = self.config
        native = config.grid_size(*as_pair(config.image_size, "image_size"))
        prefix = config.num_position_prefix_tokens
        if self.pos_embed is None:
            return None
        if isinstance(self.pos_embed, LearnedPosition2d):
            return self.pos_embed(grid)
        if config.position == "sincos_2d":
            if grid == native:
                return self.pos_embed
            return sincos_position_embedding(grid, config.embed_dim, num_prefix_tokens=prefix).to(self.pos_embed)
        return resize_position_embedding(
            self.pos_embed, native, grid, num_prefix_tokens=prefix, resampling=config.position_resampling
        )

    def _new_position_embedding(self) -> nn.Module | nn.Parameter | None:
        config = self.config
        grid = config.grid_size(*as_pair(config.image_size, "image_size"))
        prefix = config.num_position_prefix_tokens
        if config.position in ("none", "relative", "rope_2d"):
            return None
        if config.position == "learned_2d":
            return LearnedPosition2d(grid, config.embed_dim, num_prefix_tokens=prefix)
        if config.position == "sincos_2d":
            table = sincos_position_embedding(grid, config.embed_dim, num_prefix_tokens=prefix)
            return nn.Parameter(table, requires_grad=False)
        return _token(prefix + grid[0] * grid[1], config.embed_dim)


def _check_encoder(encoder: nn.Module, config: ViTConfig) -> None:
    """Raise InputError if the configuration asks for what only the model's own layers have."""
    name = type(encoder).__name__
    if config.position in ("relative", "rope_2d"):
        raise InputError(
            f"position {config.position!r} lives in the attention of the model's own layers, which encoder={name} replaces; "
            "choose a position embedding that is added to the tokens, or position='none' if the encoder has its own"
        )
    changed = [field for field in _LAYER_FIELDS if getattr(config, field) != getattr(ViTConfig, field)]
    if changed:
        raise InputError(
            f"{', '.join(changed)} of the configuration describe the model's own layers, which encoder={name} replaces; "
            "leave them at their defaults and set them in the encoder"
        )
    if isinstance(encoder, nn.TransformerEncoder) and not encoder.layers[0].self_attn.batch_first:
        raise InputError(
            "an encoder takes tokens (batch, token, dim), and this TransformerEncoder takes (token, batch, dim); "
            "build its layers with batch_first=True"
        )


def _token(count: int, dim: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, count, dim), std=0.02))
