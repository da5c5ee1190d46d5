"""Mean attention distance once more, by nested loops over windows; a layer over the whole image is one window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tests import reference
from tests.families.family import Family, Placed, Size
from vit_probe.measures.attention_distance import Prefix

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Distance:
    """Of one layer: by head, mean over images and query patches; and of uniform attention."""

    distance: Array
    std: Array
    patch_mass: Array
    uniform: float


def placed(family: Family, model, size: Size) -> list[Placed]:
    """Where the patches lie in each layer; a token that is none is -1."""
    grid, windows = family.grid(size), family.windows(model, size)
    tokens = np.array([-1] * grid.num_prefix_tokens + list(range(grid.num_patches)))
    whole = Placed(grid.rows, grid.cols, grid.patch_size, Tensor(tokens[None]))
    return [windows.get(layer, whole) for layer in range(len(family.layers))]


def attention_distance(attention: Tensor, where: Placed, prefix: Prefix) -> Distance:
    """Of the softmax weights (window, head, query, key) of a layer, those of the first image's windows first."""
    weights = attention.detach().double().numpy()
    patches = where.patches.long().numpy()
    hidden = np.zeros((*patches.shape, patches.shape[1]), bool) if where.masked_pairs is None else where.masked_pairs.numpy()
    centres = reference.patch_centres(where.rows, where.cols, *where.patch_size)
    images, heads = len(weights) // len(patches), weights.shape[1]
    distance, mass = np.zeros((images, heads)), np.zeros((images, heads))
    uniform = []
    for window, tokens in enumerate(patches):
        keys = np.flatnonzero(tokens >= 0)
        for query in keys:
            lengths = np.array([np.hypot(*(centres[tokens[query]] - centres[tokens[key]])) for key in keys])
            seen = ~hidden[window, query, keys]
            uniform.append(sum(lengths[seen]) / sum(seen))
            for image in range(images):
                for head in range(heads):
                    paid = weights[image * len(patches) + window, head, query, keys]
                    mass[image, head] += sum(paid)
                    distance[image, head] += sum(paid * lengths) / (sum(paid) if prefix == "renormalize" else 1)
    count = where.rows * where.cols
    distance, mass = distance / count, mass / count
    return Distance(distance.mean(0), distance.std(0, ddof=1), mass.mean(0), float(np.mean(uniform)))
