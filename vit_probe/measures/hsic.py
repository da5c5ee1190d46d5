"""The unbiased estimator of the Hilbert-Schmidt independence criterion (HSIC), with a linear kernel."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vit_probe.measures.base.reduce import wide

__all__ = ["MIN_IMAGES", "centred_pairs", "inner_products"]

MIN_IMAGES = 4
"""Smallest number of images for which the estimator is defined."""

_ROUNDING_EPS = 100  # multiples of the machine epsilon that count as rounding
_CHUNK_SIZE = 1 << 21  # numbers converted to float64 at a time


def inner_products(tokens: Float[Tensor, "image patch dim"]) -> Float[np.ndarray, "image image"]:
    """Inner products of all pairs of images, each represented by its concatenated tokens, in float64 (float32 on MPS).

    The first image's tokens are subtracted from all images: HSIC is invariant to a common shift, and rounding errors are
    smaller.

    Examples:
        >>> inner_products(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[0.0, 0.0]]]))
        array([[0., 0., 0.],
               [0., 5., 1.],
               [0., 1., 1.]])
    """
    images, _, dim = tokens.shape
    dtype = wide(tokens.device)
    products = torch.zeros(images, images, dtype=dtype, device=tokens.device)
    for chunk in tokens.split(max(1, _CHUNK_SIZE // (images * dim)), dim=1):
        rows = chunk.to(dtype).flatten(1)
        rows = rows - rows[:1]
        products += rows @ rows.T
    return products.cpu().numpy()


def centred_pairs(products: Float[np.ndarray, "image image"]) -> Float[np.ndarray, "pair"]:
    """A vector whose inner product with that of other representations is the number of images times the HSIC estimate.

    It holds the entries above the diagonal of the inner products, centred so that each row without the diagonal sums to 0,
    times sqrt(2 / (images - 3)). If only rounding errors remain, as when all images but one are equal, it is 0.

    References:
        The estimator: Song et al. 2012, Feature Selection via Dependence Maximization, JMLR 13, equation 5. Its form as an
        inner product: Székely & Rizzo 2014, Partial distance correlation with methods for dissimilarities, Annals of
        Statistics 42, definition 2.

    Examples:
        >>> tokens = torch.tensor([0.0, 0.0, 1.0, 2.0])[:, None, None]
        >>> pairs = centred_pairs(inner_products(tokens))
        >>> pairs.shape, round(float(pairs @ pairs) / len(tokens), 4)  # 6 pairs of 4 images; HSIC with itself
        ((6,), 0.6667)
    """
    count, tolerance = len(products), _ROUNDING_EPS * np.finfo(products.dtype).eps
    products = products.astype(np.float64)
    off_diagonal = products - np.diag(np.diag(products))
    sums = off_diagonal.sum(axis=0) / (count - 2)
    centred = off_diagonal - sums[:, None] - sums[None, :] + sums.sum() / (count - 1)
    pairs = centred[np.triu_indices(count, k=1)] * math.sqrt(2 / (count - 3))
    return pairs if np.linalg.norm(pairs) > tolerance * np.linalg.norm(products) else np.zeros_like(pairs)
