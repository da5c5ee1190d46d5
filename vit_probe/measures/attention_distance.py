"""Mean attention distance: how far, in pixels, each head looks."""

from __future__ import annotations

import torch
from torch import Tensor

from vit_probe.measures.base.offset_measure import offset_measure

__all__ = ["mean_attention_distance"]


@offset_measure(
    unit="pixels",
    reference="arXiv:2010.11929",
    name="attention_distance",
    value="distance",
    label="Mean attention distance",
    command="distance",
)
def mean_attention_distance(dx: Tensor, dy: Tensor) -> Tensor:
    """Attention-weighted distance from each query patch to all patches, in pixels, for every layer and head.

    For layer l and head h: the mean over images and query patches i of sum_j a_ij ||x_i - x_j||, x the patch centres in pixels
    of the model's input. The distance of a patch to itself is 0 and counts. Prefix tokens are not queries. What becomes of
    attention paid to them the paper leaves open; see `prefix`. A query whose attention on patches rounds to 0 has no distance
    and is left out. In a layer that attends within windows (SAM, Swin) j runs over the window of i. Tokens that pad a window
    are treated like prefix tokens, and so are tokens behind the patches.

    Returns:
        A `HeadResult`: `distance` (pixels) with its spread over images, `patch_mass` (the share of attention on patches),
        `excluded` (the share of queries left out; in the table if there are any), and `uniform_distance`, the distance of a
        head that attends equally to all patches.

    Raises:
        InputError: If an option is unknown, the images cannot be used, the grid does not fit the attention, or no attention is
            seen.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figures 7 (right) and 11, section 4.5, appendix D.7;
        Raghu et al. 2021, arXiv:2108.08810, figure 3.

    Examples:
        >>> from vit_probe import load_model, mean_attention_distance
        >>> result = mean_attention_distance(load_model("demo"), torch.zeros(1, 3, 64, 64))
        >>> result.distance.shape, round(float(result.uniform_distance[0]), 1)
        ((9, 6), 33.1)
    """
    return torch.hypot(dx, dy)
