"""What is known of one self-attention call, made through the fused attention or in the model's own code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

__all__ = ["AttentionCall", "UnfusedCall"]


@dataclass(frozen=True)
class AttentionCall:
    """One call of `scaled_dot_product_attention` by a self-attention layer.

    Args:
        layer: Number of the layer.
        name: Path of the module that made the call.
        query, key, value: Before grouped heads are repeated and before autocast casts.
        mask: As passed to the call, broadcastable to its images; or None.
        dropout_p, is_causal, scale, enable_gqa: As passed to the call.
        discard_output: Whether the result of the call is not used.
    """

    layer: int
    name: str
    query: Float[Tensor, "image head query dim"]
    key: Float[Tensor, "image key_head key dim"]
    value: Float[Tensor, "image key_head key value_dim"]
    mask: Tensor | None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    discard_output: bool = False

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors from which the result is computed."""
        return self.query, self.key, self.value

    def output(self) -> Tensor:
        """Return the result of the untouched call."""
        return F.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            self.mask,
            self.dropout_p,
            self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )

    def identity_output(self) -> Tensor:
        """Return what the result would be if each token attended to itself alone."""
        values = self.value
        if self.enable_gqa:
            values = values.repeat_interleave(self.query.shape[1] // values.shape[1], dim=1)
        return values.expand(*self.query.shape[:3], -1).contiguous()

    def token_vectors(self) -> tuple[Float[Tensor, "image head token dim"], Float[Tensor, "image key_head token dim"]]:
        """Return a vector of each query and one of each key, which depend on that token alone."""
        return self.query, self.key


@dataclass(frozen=True, kw_only=True)
class UnfusedCall(AttentionCall):
    """Attention in the model's own code: the product of a softmax and the values.

    Its queries and keys are unknown. `query`, `key` and `value` are of width 0, so that their products are 0 and the scores
    come in as the `mask` alone: whatever computes softmax(scale * query @ key.T + mask) gets the right attention.

    Args:
        product: From attention weights to the result of the model's own product.
        weights: The weights in that product, as the model has them: images and heads may share a dimension.
        values: The other factor.
        to_tokens: Puts the axes of the result into the order (image, head, token, dim).
    """

    product: Callable[[Tensor], Tensor]
    weights: Tensor
    values: Tensor
    to_tokens: Callable[[Tensor], Tensor]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        assert self.mask is not None
        return self.mask, self.values

    def output(self) -> Tensor:
        return self.product(self.weights)

    def identity_output(self) -> Tensor:
        tokens = self.weights.shape[-1]
        identity = torch.eye(tokens, dtype=self.weights.dtype, device=self.weights.device)
        return self.product(identity.expand(self.weights.shape))

    def token_vectors(self) -> tuple[Tensor, Tensor]:
        # Identity attention returns each token's own value. The score of a token with itself depends on that token alone, too,
        # unless the queries are those of other tokens, or the largest score of each row was subtracted, which softmax does not
        # notice.
        assert self.mask is not None
        values = self.to_tokens(self.identity_output()).reshape(*self.query.shape[:3], -1)
        if not self.mask.amax(dim=-1).any():
            return values, values
        own_scores = self.mask.diagonal(dim1=-2, dim2=-1)[..., None]
        return values, own_scores.clamp_min(-1e4)  # where a mask hides each token from itself
