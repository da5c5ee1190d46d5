"""Means and standard deviations over images that arrive in any number of parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import t

from vit_probe.errors import InputError
from vit_probe.results import check_finite

__all__ = ["Averages", "LayerStats", "RunningStats"]


@dataclass
class RunningStats:
    """Mean over images, and sum of squared deviations from it, of arrays of values in float64.

    An image may lack a value: it is left out of that value's mean.

    Args:
        count: Number of images that have the value.
        mean: Mean over these images; 0 where there are none.
        squares: Sum over these images of squared deviations from the mean.

    References:
        Chan et al. 1983, Algorithms for computing the sample variance: exact for any split, and stable where a sum of squares
        would cancel.

    Examples:
        >>> stats = RunningStats.from_samples(np.array([[1.0], [3.0]]))
        >>> stats.merge(RunningStats.from_samples(np.array([[8.0]])))
        >>> stats.count.tolist(), stats.mean.tolist()
        ([3], [4.0])
    """

    count: Int[np.ndarray, "*values"]
    mean: Float[np.ndarray, "*values"]
    squares: Float[np.ndarray, "*values"]

    @classmethod
    def empty(cls, *shape: int) -> RunningStats:
        """Statistics of no images yet."""
        return cls(np.zeros(shape, dtype=np.int64), np.zeros(shape), np.zeros(shape))

    @classmethod
    def from_samples(cls, values: Float[np.ndarray, "image *values"]) -> RunningStats:
        """Statistics of some images; a masked array masks the values that images lack."""
        has_value = ~np.ma.getmaskarray(values)
        values = np.ma.getdata(values)
        count = has_value.sum(axis=0)
        mean = np.where(has_value, values, 0).sum(axis=0) / np.maximum(count, 1)
        return cls(count, mean, (np.where(has_value, values - mean, 0) ** 2).sum(axis=0))

    def merge(self, other: RunningStats) -> None:
        """Add the images of `other`."""
        total = self.count + other.count
        divisor = np.maximum(total, 1)  # 0 images change nothing
        step = other.mean - self.mean
        self.squares = self.squares + other.squares + step**2 * (self.count * other.count / divisor)
        self.mean = self.mean + step * (other.count / divisor)
        self.count = total

    def defined_mean(self) -> Float[np.ndarray, "*values"]:
        """Mean over the images that have the value; NaN where there are none."""
        return np.where(self.count > 0, self.mean, np.nan)

    def confidence(self, level: float = 0.95) -> Float[np.ndarray, "*values"]:
        """Half the width of the confidence interval of the mean (Student's t); NaN for one image."""
        count = np.maximum(self.count, 2)  # of fewer images, std() is NaN
        return np.asarray(self.std() / np.sqrt(count) * t.ppf((1 + level) / 2, count - 1))

    def std(self) -> Float[np.ndarray, "*values"]:
        """Standard deviation over images (n - 1); NaN for one image."""
        return np.sqrt(np.where(self.count > 1, self.squares, np.nan) / np.maximum(self.count - 1, 1))


@dataclass(frozen=True)
class Averages:
    """Statistics over images of named values, layer by layer.

    Arrays are (layer, *values). Where layers differ in shape, as in their number of heads, what a layer lacks is NaN.

    Args:
        values: Mean over images.
        std: Standard deviation over images (n - 1; NaN for one image).
        confidence: Half the width of the 95 % confidence interval of the mean.
        per_image: The value of every image (image, layer, *values); empty unless they were kept.
        num_images: Number of images.
    """

    values: dict[str, np.ndarray]
    std: dict[str, np.ndarray]
    confidence: dict[str, np.ndarray]
    per_image: dict[str, np.ndarray]
    num_images: int

    def fields(self, names: Sequence[str] | None) -> dict[str, Any]:
        """The fields of an `AveragedResult`, given the names of the images."""
        names = list(names or [f"image {index}" for index in range(self.num_images)]) if self.per_image else []
        return vars(self) | {"names": names}


class LayerStats:
    """Running statistics of named values for each layer of a model.

    Sums are in float64 over whole images, so splitting the images into batches or processes changes nothing but rounding.

    Args:
        display_name: What is measured, for messages.
        per_image: Whether to keep the values of every image, too.
    """

    def __init__(self, display_name: str, *, per_image: bool = False) -> None:
        self.modules: list[str] = []
        self._display_name = display_name
        self._keeps = per_image
        self._stats: list[dict[str, RunningStats]] = []
        self._kept: list[dict[str, list[np.ndarray]]] = []
        self._checkpoint: tuple[Any, ...] = [], [], []

    @property
    def shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """For each layer, the shape of its values by name."""
        return [{name: stats.mean.shape for name, stats in layer.items()} for layer in self._stats]

    def add(self, layer: int, module: str, values: Mapping[str, Float[np.ndarray, "image *values"]]) -> None:
        """Add the values of some images in one layer; layers are numbered in the order in which they first come.

        Raises:
            InputError: If a value is NaN or infinite (values that an image lacks are masked instead), or the values have other
                names or shapes than those of earlier images.
        """
        for of_images in values.values():
            check_finite(np.ma.filled(of_images, 0), self._display_name)
        while len(self._stats) <= layer:
            self._stats.append({name: RunningStats.empty(*of_images.shape[1:]) for name, of_images in values.items()})
            self._kept.append({name: [] for name in values} if self._keeps else {})
            self.modules.append(module)
        now = {name: of_images.shape[1:] for name, of_images in values.items()}
        if now != self.shapes[layer]:
            raise InputError(
                f"{self._display_name} in layer {layer} have the shapes {now}, but those of earlier images had "
                f"{self.shapes[layer]}; return the same values for all images"
            )
        for name, of_images in values.items():
            self._stats[layer][name].merge(RunningStats.from_samples(of_images))
            if self._keeps:
                self._kept[layer][name].append(np.ma.filled(of_images, np.nan))

    def set_checkpoint(self) -> None:
        """Remember the present state for `roll_back`."""
        self._checkpoint = self._copied()

    def roll_back(self) -> None:
        """Forget everything since `set_checkpoint`."""
        self.modules, self._stats, self._kept = self._checkpoint
        self._checkpoint = self._copied()  # a second failure must find it unchanged

    def _copied(self) -> tuple[Any, ...]:
        stats = [{name: copy(one) for name, one in layer.items()} for layer in self._stats]
        kept = [{name: list(parts) for name, parts in layer.items()} for layer in self._kept]
        return list(self.modules), stats, kept

    def state(self) -> dict[str, Any]:
        """What `restore` needs to continue from here: arrays, and what JSON can hold."""
        arrays: dict[str, Any] = {}
        for layer, stats in enumerate(self._stats):
            for name, one in stats.items():
                arrays |= {f"{layer}.{name}.{part}": _stored(value) for part, value in vars(one).items()}
                if self._keeps:
                    arrays[f"{layer}.{name}.per_image"] = np.concatenate(self._kept[layer][name])
        return arrays | {"modules": list(self.modules), "names": [list(layer) for layer in self._stats]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to where `state` was taken."""
        self.modules = list(state["modules"])
        self._stats = [
            {
                name: RunningStats(
                    np.asarray(state[f"{layer}.{name}.count"]).astype(np.int64),
                    np.asarray(state[f"{layer}.{name}.mean"]),
                    np.asarray(state[f"{layer}.{name}.squares"]),
                )
                for name in names
            }
            for layer, names in enumerate(state["names"])
        ]
        self._kept = [
            {name: [state[f"{layer}.{name}.per_image"]] for name in names} if self._keeps else {}
            for layer, names in enumerate(state["names"])
        ]

    def merge(self, other: Self) -> None:
        """Add the images of `other`, behind those of this one. Either may be empty.

        Raises:
            InputError: If `other` has other layers or values of other shapes.
        """
        if self._stats and other._stats and self.shapes != other.shapes:
            raise InputError(
                f"cannot merge {self._display_name}: one has layers with values {other.shapes}, the other {self.shapes}; "
                "measure images of one size with one model"
            )
        if not self._stats:
            self.modules = list(other.modules)
            self._stats = [{name: RunningStats.empty(*shape) for name, shape in layer.items()} for layer in other.shapes]
            self._kept = [{name: [] for name in layer} for layer in other._kept]
        for mine, theirs in zip(self._stats, other._stats, strict=False):
            for name, added in theirs.items():
                mine[name].merge(added)
        for kept, added_parts in zip(self._kept, other._kept, strict=False):
            for name, parts in added_parts.items():
                kept[name] += parts

    def reorder(self, order: Sequence[int]) -> None:
        """Put the kept values into another order: first those of the image that was the `order[0]`-th."""
        self._kept = [
            {name: [np.concatenate(parts)[list(order)]] for name, parts in layer.items() if parts} for layer in self._kept
        ]

    def averages(self) -> Averages:
        """The statistics over all images so far.

        Raises:
            InputError: If there were none, or the layers have seen different images.
        """
        if not self._stats:
            raise InputError(f"no {self._display_name} have been measured yet")
        counts = [max(int(stats.count.max(initial=0)) for stats in layer.values()) for layer in self._stats]
        if len(set(counts)) > 1:
            raise InputError(
                f"the layers have seen different numbers of images ({', '.join(map(str, counts))}), which do not make one table"
            )
        names = list(self._stats[0])
        return Averages(
            values={name: _stacked([layer[name].defined_mean() for layer in self._stats]) for name in names},
            std={name: _stacked([layer[name].std() for layer in self._stats]) for name in names},
            confidence={name: _stacked([layer[name].confidence() for layer in self._stats]) for name in names},
            per_image={
                name: np.moveaxis(_stacked([np.concatenate(layer[name]) for layer in self._kept]), 0, 1)
                for name in (names if self._keeps else [])
            },
            num_images=counts[0],
        )


def _stored(value: Any) -> Any:
    """An array; a single number as a plain one, since files of arrays give it an axis."""
    return value if np.ndim(value) else float(value)


def _stacked(layers: Sequence[Float[np.ndarray, "*values"]]) -> Float[np.ndarray, "layer *values"]:
    """One array of all layers, filled with NaN where a layer is smaller than another along an axis."""
    shape = np.max([layer.shape for layer in layers], axis=0).astype(int) if layers[0].ndim else ()
    table = np.full((len(layers), *shape), np.nan)
    for index, layer in enumerate(layers):
        table[index, ...][tuple(slice(length) for length in layer.shape)] = layer
    return table
