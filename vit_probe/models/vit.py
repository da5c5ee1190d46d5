"""A Vision Transformer in which every intermediate has a name.

Axes, here and everywhere in the package: `batch layer head query key token patch row col channel dim`. Module and
parameter names are timm's, so that timm's state dicts load as they are.
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
from vit_probe.models.position_embedding import LearnedPosition2d, resize_position_embedding, sincos_position_embedding
from vit_probe.tokens.grid import TokenGrid

if TYPE_CHECKING:
    from vit_probe.data.preprocessing import Preprocessing

__all__ = ["VisionTransformer"]


class VisionTransformer(nn.Module):
    """The Vision Transformer of a `ViTConfig`.

    Takes images of any size that divides into patches: for another grid than the native one, the position table is
    interpolated on the fly (`resize` does so once and for all, for fine-tuning).

    Args:
        config: What to build.
        stem: Replaces the patch embedding: any module that maps images (batch, channel, height, width) to a feature map
            (batch, embed_dim, row, col), whose cells become the tokens; one cell stands for `config.patch_size` pixels.

    Attributes:
        preprocessing: How photographs become this model's input; None unless its checkpoint said so.
        name: What results call the model; `load_model` puts the checkpoint's name here.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 3 and figure 1.
    """

    head: nn.Module
    head_dist: nn.Module

    def __init__(self, config: ViTConfig, *, stem: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.preprocessing: Preprocessing | None = None
        self.name = "VisionTransformer"
        dim = config.embed_dim
        self.patch_embed: nn.Module = stem or (HybridEmbed(config) if config.stem else PatchEmbed(config))
        self.cls_token = _token(1, dim) if config.class_token else None
        self.dist_token = _token(1, dim) if config.distillation_token else None
        self.reg_token = _token(config.num_registers, dim) if config.num_registers else None
        self.pos_embed: Any = self._new_position_embedding()
        self.pos_drop = nn.Dropout(config.dropout)
        self.norm_pre = nn.LayerNorm(dim, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        rates = [config.drop_path * layer / max(config.depth - 1, 1) for layer in range(config.depth)]
        self.blocks: Any = nn.ModuleList(Block(config, drop_path=rate) for rate in rates)
        pooled_dim = 2 * dim if config.pooling == "token+avg" else dim
        self.norm = nn.Identity() if config.norm_pooled else nn.LayerNorm(dim, eps=config.norm_eps)
        self.fc_norm = nn.LayerNorm(pooled_dim, eps=config.norm_eps) if config.norm_pooled else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.replace_head(config.num_classes)

    def forward(self, images: Float[Tensor, "batch channel height width"], *, mask: Mask | None = None) -> Tensor:
        """Logits (batch, num_classes), or pooled features (batch, dim) where there is no head.

        Args:
            images: Preprocessed images.
            mask: Given to every layer's attention: True (or a number added to the scores) where a query may attend to a key;
                broadcast to (batch, head, query, key).
        """
        return self.forward_head(self.forward_features(images, mask=mask))

    def forward_features(
        self, images: Float[Tensor, "batch channel height width"], *, mask: Mask | None = None
    ) -> Float[Tensor, "batch token dim"]:
        """All tokens after the last layer and the final norm, prefix tokens first.

        Raises:
            InputError: If the images have the wrong shape or do not divide into patches.
        """
        if images.ndim != 4 or images.shape[1] != self.config.in_channels:
            raise InputError(
                f"this model takes images (batch, {self.config.in_channels}, height, width), got shape {tuple(images.shape)}"
            )
        x = self.norm_pre(self.pos_drop(self._embed(images)))
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def forward_head(self, tokens: Float[Tensor, "batch token dim"]) -> Tensor:
        """Logits, or pooled features where there is no head, from the tokens of `forward_features`."""
        pooling = self.config.pooling
        if pooling == "distilled":
            cls, distilled = self.fc_norm(tokens[:, 0]), self.fc_norm(tokens[:, 1])
            return (self.head(cls) + self.head_dist(distilled)) / 2
        pooled = [tokens[:, 0]] if "token" in pooling else []
        if "avg" in pooling:
            pooled.append(tokens[:, self.config.num_prefix_tokens :].mean(dim=1))
        return self.head(self.fc_norm(torch.cat(pooled, dim=-1)))

    def token_grid(self, height: int, width: int) -> TokenGrid:
        """Where the tokens of an image of this many pixels lie.

        Raises:
            InputError: If the image does not divide into patches.
        """
        config = self.config
        rows, cols = config.grid_size(height, width)
        return TokenGrid(rows, cols, config.patch_stride, config.num_prefix_tokens, config.class_token)

    def position_table(self) -> tuple[Float[Tensor, "patch dim"], int, int] | None:
        """Position embeddings of the patches at the native image size, with rows and columns; None where there are none."""
        rows, cols = self.config.grid_size(*as_pair(self.config.image_size, "image_size"))
        table = self._position_embedding((rows, cols))
        return None if table is None else (table[0, self.config.num_position_prefix_tokens :], rows, cols)

    def replace_head(self, num_classes: int) -> VisionTransformer:
        """Puts a zero-initialised linear head of `num_classes` outputs (0: none) in place, for fine-tuning; returns the model.

        References:
            Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.2.
        """
        if num_classes < 0:
            raise InputError(f"num_classes must be 0 (no head) or more, got {num_classes}")
        config = self.config = replace(self.config, num_classes=num_classes)
        pooled_dim = config.embed_dim * (2 if config.pooling == "token+avg" else 1)
        like = self.blocks[-1].mlp.fc2.weight
        for name in ("head", "head_dist") if config.pooling == "distilled" else ("head",):
            head: nn.Module = nn.Identity()
            if num_classes:
                head = nn.Linear(pooled_dim, num_classes, device=like.device, dtype=like.dtype)
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
            self.add_module(name, head)
        return self

    def resize(self, image_size: int | tuple[int, int]) -> VisionTransformer:
        """Makes `image_size` (one side or both) the native one, interpolating the position table; returns the model.

        `preprocessing`, where there is one, is scaled along.

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
        self.config = config
        if self.preprocessing is not None:
            self.preprocessing = self.preprocessing.scaled(as_pair(image_size, "image_size"))
        return self

    def _embed(self, images: Tensor) -> Tensor:
        """Patch tokens and prefix tokens with their positions added."""
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
        # Prefix tokens beyond those the table covers (registers, mostly) have no position.
        covered, uncovered = self.config.num_position_prefix_tokens, self.config.num_prefix_tokens
        position = torch.cat(
            [position[:, :covered], position.new_zeros(1, uncovered - covered, position.shape[2]), position[:, covered:]], 1
        )
        return tokens + position

    def _position_embedding(self, grid: tuple[int, int]) -> Any:
        """The table for `grid` (1, token, dim): entries of the covered prefix tokens, then of the patches; or None."""
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
        if config.position == "none":
            return None
        if config.position == "learned_2d":
            return LearnedPosition2d(grid, config.embed_dim, num_prefix_tokens=prefix)
        if config.position == "sincos_2d":
            table = sincos_position_embedding(grid, config.embed_dim, num_prefix_tokens=prefix)
            return nn.Parameter(table, requires_grad=False)
        return _token(prefix + grid[0] * grid[1], config.embed_dim)


def _token(count: int, dim: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, count, dim), std=0.02))
