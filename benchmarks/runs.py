"""What a method is: a function that loads a model and returns the work to be timed, whose numbers can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from benchmarks.models import Setting

__all__ = ["Numbers", "Prepare", "Run", "as_array"]

Numbers = dict[str, np.ndarray]
"""`distance` and `distance-dropped` (layer, head), attention to the class token rescaled away or dropped; `entropy` (layer,
head); `rollout` (image, row, col); `output` (image, dim), the class token after the last layer."""

Run = Callable[[Sequence[Tensor]], Numbers]
"""Takes batches of images."""

Prepare = Callable[[Setting], Run]
"""Loads the model and the images; what it returns is timed."""


def as_array(tensor: Tensor) -> np.ndarray:
    """In float32, on the CPU."""
    return tensor.float().cpu().numpy()
