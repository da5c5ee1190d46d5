"""Types of a method: a function that loads a model and returns the function to time, whose numbers can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from benchmarks.models import Setting

__all__ = ["Numbers", "Prepare", "Run", "as_array"]

Numbers = dict[str, np.ndarray]
"""`distance` and `distance-dropped` (layer, head), with prefix="renormalize" and prefix="drop"; `entropy` (layer, head);
`rollout` (image, row, col); `output` (image, dim), the class token after the last layer."""

Run = Callable[[Sequence[Tensor]], Numbers]
"""Takes batches of images."""

Prepare = Callable[[Setting], Run]
"""Loads the model and the images, and returns the function to time."""


def as_array(tensor: Tensor) -> np.ndarray:
    """The tensor as a float32 array."""
    return tensor.float().cpu().numpy()
