"""All arrays of a result, for comparing two results."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["result_arrays"]


def result_arrays(result: Any) -> dict[str, np.ndarray]:
    """The arrays of a result by name, those in its dictionaries included."""
    arrays: dict[str, np.ndarray] = {}
    for field, value in vars(result).items():
        entries = {f"{field}.{name}": entry for name, entry in value.items()} if isinstance(value, dict) else {field: value}
        arrays |= {name: entry for name, entry in entries.items() if isinstance(entry, np.ndarray)}
    assert arrays  # a comparison of no arrays would always succeed
    return arrays
