"""Means and standard deviations over images that arrive in any number of parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import t

__all__ = ["RunningStats"]


@dataclass
class RunningStats:
    """Mean over images, and the sum of squared deviations from it, of several values in float64.

    References:
        Chan et al. 1983, Algorithms for computing the sample variance: exact for any split, and stable where a sum of squares
        would cancel.
    """

    count: int
    mean: Float[np.ndarray, "*values"]
    squares: Float[np.ndarray, "*values"]

    @classmethod
    def empty(cls, *shape: int) -> RunningStats:
        """Of no images yet."""
        return cls(0, np.zeros(shape), np.zeros(shape))

    @classmethod
    def from_samples(cls, values: Float[np.ndarray, "image *values"]) -> RunningStats:
        """Of these images."""
        mean = values.mean(axis=0)
        return cls(len(values), mean, ((values - mean) ** 2).sum(axis=0))

    def copy(self) -> RunningStats:
        """One that later additions do not change."""
        return RunningStats(self.count, self.mean, self.squares)

    def merge(self, other: RunningStats) -> None:
        """Adds the images of `other`."""
        total = self.count + other.count
        if total == 0:
            return
        step = other.mean - self.mean
        self.squares = self.squares + other.squares + step**2 * (self.count * other.count / total)
        self.mean = self.mean + step * (other.count / total)
        self.count = total

    def state(self) -> dict[str, int | np.ndarray]:
        """Its fields by name."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def confidence(self, level: float = 0.95) -> Float[np.ndarray, "*values"]:
        """Half the width of the confidence interval of the mean, after Student's t; NaN for one image."""
        if self.count < 2:
            return np.full_like(self.squares, np.nan)
        return self.std() / np.sqrt(self.count) * t.ppf((1 + level) / 2, self.count - 1)

    def std(self) -> Float[np.ndarray, "*values"]:
        """Standard deviation over images (n - 1); NaN for one image."""
        return np.sqrt(self.squares / (self.count - 1)) if self.count > 1 else np.full_like(self.squares, np.nan)
