"""The layers of a Vision Transformer: attention, MLP, and the pre-norm block that combines them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from vit_probe.errors import InputError
from vit_probe.models.config import ViTConfig, as_pair
from vit_probe.models.position_embedding import PatchPositions
from vit_probe.models.relative_position import RelativePosition
from vit_probe.models.rotary_position import rotate_by_position

__all__ = ["Block", "DropPath", "Mask"]

Mask = Bool[Tensor, "..."] | Float[Tensor, "..."]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), as in CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SwiGLU(nn.Module):
    """silu(gate) * value, where gate and value are the two halves of the last axis (Shazeer 2020, arXiv:2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class Attention(nn.Module):
    """Multi-head self-attention, computed by `scaled_dot_product_attention`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim, head_dim = config.embed_dim, config.dim_per_head
        self.num_heads = config.num_heads
        self.position = config.position
        self.qkv = nn.Linear(dim, 3 * config.num_heads * head_dim, bias=config.qkv_bias)
        self.q_norm = nn.LayerNorm(head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.num_heads * head_dim, dim)
        self.drop = nn.Dropout(config.dropout)
        if config.position == "relative":
            self.rel_pos = RelativePosition(config.grid_size(*as_pair(config.image_size, "image_size")), head_dim)

    def forward(
        self, x: Float[Tensor, "batch token dim"], mask: Mask | None = None, positions: PatchPositions | None = None
    ) -> Float[Tensor, "batch token dim"]:
        query, key, value = rearrange(
            self.qkv(x), "batch token (three head dim) -> three batch head token dim", three=3, head=self.num_heads
        )
        query, key = self.q_norm(query), self.k_norm(key)
        if self.position in ("relative", "rope_2d"):
            if positions is None:
                raise InputError(
                    f"attention with {self.position} positions needs to know where the patches lie; call the model"
                )
            if self.position == "rope_2d":
                query, key = rotate_by_position(query, positions), rotate_by_position(key, positions)
            else:
                mask = _with_bias(mask, self.rel_pos(query, positions))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.drop(self.proj(rearrange(out, "batch head token dim -> batch token (head dim)")))


def _with_bias(mask: Mask | None, bias: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
    """Mask and bias combined into one term to add to the scores."""
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
    "swiglu": SwiGLU,
}


class Mlp(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        hidden = round(config.embed_dim * config.mlp_ratio)
        gated = config.activation == "swiglu"
        self.fc1 = nn.Linear(config.embed_dim, 2 * hidden if gated else hidden)
        self.act = _ACTIVATIONS[config.activation]()
        self.fc2 = nn.Linear(hidden, config.embed_dim)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class LayerScale(nn.Module):
    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a residual branch for each image with probability `rate`, else scales it up.

    Args:
        rate: Probability of dropping the branch.

    References:
        Huang et al. 2016, arXiv:1603.09382.

    Examples:
        >>> DropPath(0.5).eval()(torch.ones(2, 3, 4)).sum()
        tensor(24.)
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        kept = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)


class Block(nn.Module):
    """One pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        config: The model's configuration.
        drop_path: Rate of stochastic depth in this layer.

    Examples:
        >>> block = Block(ViTConfig(embed_dim=24, num_heads=3))
        >>> block(torch.rand(2, 17, 24)).shape
        torch.Size([2, 17, 24])
    """

    def __init__(self, config: ViTConfig, *, drop_path: float = 0.0) -> None:
        super().__init__()
        dim, scale = config.embed_dim, config.layer_scale
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = Mlp(config)
        self.ls2 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.drop_path2 = DropPath(drop_path)

    def forward(
        self, x: Float[Tensor, "batch token dim"], mask: Mask | None = None, positions: PatchPositions | None = None
    ) -> Float[Tensor, "batch token dim"]:
        """Tokens after the layer.

        Args:
            x: Tokens before it, prefix tokens first.
            mask: As `scaled_dot_product_attention` takes it.
            positions: Where the patches lie; only relative and rotary positions need it.
        """
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), mask, positions)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
