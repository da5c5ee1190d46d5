"""The Hilbert-Schmidt independence criterion of representations with a linear kernel, unbiased."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vit_probe.measures.base.reduce import wide

__all__ = ["FEWEST", "centred_pairs", "inner_products"]

FEWEST = 4
"""Images of which the estimator can be computed."""

_ROUNDING = 100  # times what the type of number tells
_AT_ONCE = 1 << 21  # numbers that are made wide at a time


def inner_products(tokens: Float[Tensor, "image patch dim"]) -> Float[np.ndarray, "image image"]:
    """Inner products of all pairs of images, each represented by its tokens one after the other, in float64 (on
    MPS, which has none, float32).

    The tokens of the first image are taken from all: the criterion does not change by what all images have in common, and its
    rounding is the less.
    """
    images, _, dim = tokens.shape
    dtype = wide(tokens.device)
    products = torch.zeros(images, images, dtype=dtype, device=tokens.device)
    for part in tokens.split(max(1, _AT_ONCE // (images * dim)), dim=1):
        rows = part.to(dtype).flatten(1)
        rows = rows - rows[:1]
        products += rows @ rows.T
    return products.cpu().numpy()


def centred_pairs(products: Float[np.ndarray, "image image"]) -> Float[np.ndarray, "pair"]:
    """A vector whose inner product with that of other representations is the number of images times the estimate.

    It is what lies above the diagonal of the inner products, once they are centred so that each row without the diagonal sums
    to 0, times sqrt(2 / (images - 3)). Where nothing but rounding is left, as where all images but one are alike, it is 0.

    References:
        The estimator: Song et al. 2012, Feature Selection via Dependence Maximization, JMLR 13, equation 5. Its form as an
        inner product: Székely & Rizzo 2014, Partial distance correlation with methods for dissimilarities, Annals of
        Statistics 42, definition 2.
    """
    count, rounding = len(products), _ROUNDING * np.finfo(products.dtype).eps
    products = products.astype(np.float64)
    off_diagonal = products - np.diag(np.diag(products))
    sums = off_diagonal.sum(axis=0) / (count - 2)
    centred = off_diagonal - sums[:, None] - sums[None, :] + sums.sum() / (count - 1)
    pairs = centred[np.triu_indices(count, k=1)] * math.sqrt(2 / (count - 3))
    return pairs if np.linalg.norm(pairs) > rounding * np.linalg.norm(products) else np.zeros_like(pairs)
