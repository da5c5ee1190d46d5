"""Token similarity: how alike the patch tokens of an image become with depth (over-smoothing)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vit_probe.errors import InputError
from vit_probe.measures.base.per_layer import layer_measure
from vit_probe.measures.base.reduce import wide
from vit_probe.tokens.grid import TokenGrid

__all__ = ["token_similarity"]


@layer_measure(unit="cosine", reference="arXiv:2104.12753")
def token_similarity(tokens: Float[Tensor, "image patch dim"], grid: TokenGrid) -> dict[str, Tensor]:
    """Mean cosine similarity of all pairs of different patch tokens of an image, after each block.

    The tokens x are those after a block's residual connections, before the final normalisation; prefix tokens are left out.
    With u = x / ||x|| and N patches, the mean over pairs is (||sum_i u_i||^2 - N) / (N (N - 1)), so no N x N matrix is needed.
    A similarity near 1 means that the tokens of an image have become nearly the same, which is called over-smoothing.

    Returns:
        A `LayerResult`: `token_similarity` with its spread over images.

    Raises:
        InputError: If the images cannot be used, an image has a single patch, or the blocks of the model cannot be told apart.

    References:
        Gong et al. 2021, Vision Transformers with Patch Diversification, arXiv:2104.12753, section 3, who take the absolute
        value of each cosine; here it keeps its sign.

    Examples:
        >>> from vit_probe import load_model, token_similarity
        >>> token_similarity(load_model("demo"), torch.rand(1, 3, 64, 64)).token_similarity.shape
        (9,)
    """
    patches = tokens.shape[1]
    if patches < 2:
        raise InputError("the tokens of an image of one patch have no pairs to compare; use images of several patches")
    unit = torch.nn.functional.normalize(tokens.to(wide(tokens.device)), dim=-1)
    total = unit.sum(dim=1).square().sum(dim=-1)
    # Tokens of zeros have no direction: they add nothing to the sum, and their pairs count as 0.
    return {"token_similarity": (total - unit.square().sum(dim=(1, 2))) / (patches * (patches - 1))}
