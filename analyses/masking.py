"""Hiding patches from the layers, and a second task for training: predicting the pixels of the hidden patches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vit_probe import VisionTransformer, ViTConfig
from vit_probe.models.config import as_pair
from vit_probe.models.layers import Block
from vit_probe.models.position_embedding import sincos_position_embedding

__all__ = ["Choice", "Reconstruction", "seen_patches"]


@dataclass
class Choice:
    """The patches of each image that the layers saw in the last forward pass, and those that were hidden."""

    seen: Int[Tensor, "batch patch"]
    hidden: Int[Tensor, "batch patch"]


@contextmanager
def seen_patches(model: VisionTransformer, share: float) -> Iterator[Choice]:
    """Within the `with` block, the layers see the prefix tokens and a random share of the patches of each image.

    Patches keep their positions: those that are added to the tokens are added before, and the attention is given those of
    the patches that are left. Each forward pass updates the yielded choice.

    References:
        Liu et al. 2022, arXiv:2208.07220 (PatchDropout).
    """
    prefix = model.config.num_prefix_tokens
    choice = Choice(torch.empty(0, 0, dtype=torch.long), torch.empty(0, 0, dtype=torch.long))

    def choose(module: nn.Module, inputs: tuple[Tensor, ...], tokens: Tensor) -> Tensor | None:
        count = tokens.shape[1] - prefix
        order = torch.rand(len(tokens), count, device=tokens.device).argsort(dim=1)
        choice.seen, choice.hidden = order.tensor_split([max(round(share * count), 1)], dim=1)
        if choice.hidden.shape[1] == 0:
            return None
        return torch.cat([tokens[:, :prefix], _gather(tokens[:, prefix:], choice.seen)], dim=1)

    def place(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        tokens, mask, positions = inputs
        return (tokens, mask, replace(positions, index=choice.seen)) if choice.hidden.shape[1] else None

    handles = [model.pos_drop.register_forward_hook(choose)]
    handles += [block.register_forward_pre_hook(place) for block in model.blocks]
    try:
        yield choice
    finally:
        for handle in handles:
            handle.remove()


class Reconstruction(nn.Module):
    """Predicts the pixels of hidden patches from the tokens of the seen ones.

    Where a seen patch lies is known from its token only, and hidden patches are asked for by the model's own position
    embeddings: the task can only be solved if the positions come to tell which patches are neighbours. If the model adds no
    position embedding to its tokens, hidden patches are asked for by a sine-cosine table of this task.

    References:
        He et al. 2022, arXiv:2111.06377 (MAE); Liang et al. 2022, arXiv:2205.14540 (with labels, SupMAE).
    """

    places: Tensor

    def __init__(self, model: VisionTransformer, *, width: int = 96, depth: int = 1, heads: int = 3) -> None:
        super().__init__()
        config = ViTConfig(embed_dim=width, num_heads=heads)
        self.patch_size = height, length = model.config.patch_stride
        self.prefix = model.config.num_prefix_tokens
        self.from_token = nn.Linear(model.config.embed_dim, width)
        grid = model.config.grid_size(*as_pair(model.config.image_size, "image_size"))
        places = sincos_position_embedding(grid, width)[0] if model.position_table() is None else None
        self.register_buffer("places", places, persistent=False)
        self.from_position = nn.Linear(model.config.embed_dim if places is None else width, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.to_pixels = nn.Linear(width, height * length * model.config.in_channels)

    def forward(
        self,
        images: Float[Tensor, "batch channel height width"],
        tokens: Float[Tensor, "batch token dim"],
        positions: Float[Tensor, "patch dim"] | None,
        choice: Choice,
    ) -> Float[Tensor, ""]:
        """Mean squared error of the pixels of the hidden patches.

        Args:
            images: The model's input.
            tokens: What `forward_features` returned for it.
            positions: Position embeddings of all patches; None if the model adds none to its tokens.
            choice: The patches that the layers saw.
        """
        asked = self.from_position((self.places if positions is None else positions)[choice.hidden])
        x = torch.cat([self.from_token(tokens[:, self.prefix :]), asked], dim=1)
        for block in self.blocks:
            x = block(x)
        predicted = self.to_pixels(self.norm(x[:, -asked.shape[1] :]))
        height, length = self.patch_size
        pixels = rearrange(
            images,
            "batch channel (row height) (col width) -> batch (row col) (channel height width)",
            height=height,
            width=length,
        )
        return F.mse_loss(predicted.float(), _gather(pixels, choice.hidden))


def _gather(values: Float[Tensor, "batch patch dim"], index: Int[Tensor, "batch chosen"]) -> Float[Tensor, "batch chosen dim"]:
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))
