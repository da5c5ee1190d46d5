"""Mean attention distance by nested loops over windows; a layer that attends over the whole image has one window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tests.families.family import Family, Size, WindowLayout
from tests.reference import patch_centres

Array = NDArray[np.float64]
Prefix = Literal["renormalize", "drop"]


@dataclass(frozen=True)
class Distance:
    """Mean attention distance of one layer, per head, and the distance of uniform attention."""

    distance: Array
    std: Array
    patch_mass: Array
    uniform: float


def layouts(family: Family, model, size: Size) -> list[WindowLayout]:
    """Where the patches of each layer lie; tokens that are not patches have the index -1."""
    grid, windows = family.grid(size), family.windows(model, size)
    tokens = np.array([-1] * grid.num_prefix_tokens + list(range(grid.num_patches)))
    whole_image = WindowLayout(grid.rows, grid.cols, grid.patch_size, Tensor(tokens[None]))
    return [windows.get(layer, whole_image) for layer in range(len(family.layers))]


def attention_distance(attention: Tensor, layout: WindowLayout, prefix: Prefix) -> Distance:
    """Compute the distances from a layer's softmax weights (window, head, query, key), the first image's windows first."""
    weights = attention.detach().double().numpy()
    patches = layout.patches.long().numpy()
    masked = np.zeros((*patches.shape, patches.shape[1]), bool) if layout.masked_pairs is None else layout.masked_pairs.numpy()
    centres = patch_centres(layout.rows, layout.cols, *layout.patch_size)
    images, heads = len(weights) // len(patches), weights.shape[1]
    distance, mass = np.zeros((images, heads)), np.zeros((images, heads))
    uniform = []
    for window, tokens in enumerate(patches):
        keys = np.flatnonzero(tokens >= 0)
        for query in keys:
            lengths = np.array([np.hypot(*(centres[tokens[query]] - centres[tokens[key]])) for key in keys])
            visible = ~masked[window, query, keys]
            uniform.append(sum(lengths[visible]) / sum(visible))
            for image in range(images):
                for head in range(heads):
                    attended = weights[image * len(patches) + window, head, query, keys]
                    mass[image, head] += sum(attended)
                    distance[image, head] += sum(attended * lengths) / (sum(attended) if prefix == "renormalize" else 1)
    num_patches = layout.rows * layout.cols
    distance, mass = distance / num_patches, mass / num_patches
    return Distance(distance.mean(0), distance.std(0, ddof=1), mass.mean(0), float(np.mean(uniform)))
