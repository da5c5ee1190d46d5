"""What measures with a number for every head have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from vit_probe.attention.tiles import AttentionTile
from vit_probe.errors import InputError
from vit_probe.measures.base.reduce import ImageMeans, PerQuery
from vit_probe.measures.base.running_stats import RunningStats
from vit_probe.results import Result, check_finite
from vit_probe.tokens.grid import TokenGrid, Windows

__all__ = ["HeadTables", "PerHead", "head_frame", "layer_summary"]


@dataclass(frozen=True)
class HeadTables:
    """Statistics over images of each value, (value, layer, head); NaN where a layer has fewer heads than others.

    Args:
        mean: Over images.
        std: Standard deviation over images (n - 1; NaN for one image).
        confidence: Half the width of the 95 % confidence interval of the mean.
        num_images: Images averaged over.
    """

    mean: np.ndarray
    std: np.ndarray
    confidence: np.ndarray
    num_images: int


class PerHead(ABC):
    """A streaming measure with some values for every head, means over patch queries and images.

    Keeps sums over images in float64, so that splitting the images into batches or processes changes nothing but rounding.

    Args:
        grid: Where the patches lie.
        windows: The layers whose attention is not over all the tokens of `grid`; see `vit_probe.tokens.locate.survey`.
        values: The values of each query.
    """

    display_name: str  # is measured, for messages

    def __init__(self, grid: TokenGrid, windows: Mapping[int, Windows] | None, values: PerQuery) -> None:
        self.grid = grid
        self.windows = dict(windows or {})
        self._sums: list[RunningStats] = []
        self._modules: list[str] = []
        self._before: tuple[list[RunningStats], list[str]] = [], []
        self._means = ImageMeans(grid, self.windows, values)

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What distinguishes this measure from others of its kind, for provenance."""

    def update(self, tile: AttentionTile) -> None:
        """Adds a tile. An image counts once the last query of its last window has come."""
        means = self._means.add(tile)
        if means is not None:
            while len(self._sums) <= tile.layer:
                self._sums.append(RunningStats.empty(*means.shape[1:]))
                self._modules.append(tile.name)
            self._sums[tile.layer].merge(RunningStats.from_samples(means))

    def begin_batch(self) -> None:
        """Marks where `roll_back` goes back to."""
        self._before = [sums.copy() for sums in self._sums], list(self._modules)

    def end_batch(self) -> None:  # noqa: B027  (not every measure puts something off)
        """Does what is left to do of the batch: nothing."""

    def roll_back(self) -> None:
        """Forgets what came since `begin_batch`."""
        self._sums, self._modules = self._before

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here: arrays, and what JSON can hold."""
        arrays = {f"{layer}.{name}": value for layer, sums in enumerate(self._sums) for name, value in sums.state().items()}
        return arrays | {"modules": list(self._modules)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to where `state` was taken, of a measure with the same grid, windows and options."""
        self._modules = list(state["modules"])
        self._sums = [
            RunningStats(state[f"{layer}.count"], state[f"{layer}.mean"], state[f"{layer}.squares"])
            for layer in range(len(self._modules))
        ]

    def merge(self, other: Self) -> None:
        """Adds what `other` has seen. Either may have seen nothing.

        Raises:
            InputError: If `other` measures on another grid, in other windows, with other options, or other layers and heads.
        """
        mine, theirs = ((m.grid, m.options, [layer.mean.shape[1] for layer in m._sums]) for m in (self, other))
        if mine[:2] != theirs[:2] or (self._sums and other._sums and mine != theirs):
            raise InputError(f"cannot merge {self.display_name} of (grid, options, heads of each layer) {theirs} into {mine}")
        if self.windows.keys() != other.windows.keys() or any(
            self.windows[layer].grid != windows.grid or not torch.equal(self.windows[layer].patches, windows.patches)
            for layer, windows in other.windows.items()
        ):
            raise InputError(
                f"cannot merge {self.display_name} within other windows; measure images of one size with one model"
            )
        if not self._sums:
            self._sums, self._modules = [RunningStats.empty(*layer.mean.shape) for layer in other._sums], list(other._modules)
        for layer, added in zip(self._sums, other._sums, strict=False):
            layer.merge(added)

    def _tables(self) -> HeadTables:
        """The statistics over all images so far.

        Raises:
            InputError: If there were none, or the layers have seen different ones.
        """
        if not self._sums:
            raise InputError("no attention has been measured yet")
        if len({layer.count for layer in self._sums}) > 1:
            counts = ", ".join(str(layer.count) for layer in self._sums)
            raise InputError(f"the layers have seen different numbers of images ({counts}); they do not make one table")
        for layer in self._sums:
            check_finite(layer.mean, self.display_name)
        return HeadTables(
            mean=_table([layer.mean for layer in self._sums]),
            std=_table([layer.std() for layer in self._sums]),
            confidence=_table([layer.confidence() for layer in self._sums]),
            num_images=self._sums[0].count,
        )

    def _windows_by_layer(self) -> list[Windows | None]:
        return [self.windows.get(layer) for layer in range(len(self._sums))]


def head_frame(result: Result, modules: list[str], *names: str) -> pd.DataFrame:
    """One row a head: layer, module, head, then the attributes of `result` called `names`.

    These are (layer, head), (layer) or a number; where the first is NaN, there is no head. `attrs["skipped"]` is what the
    provenance says was passed by.
    """
    layer, head = np.nonzero(~np.isnan(getattr(result, names[0])))
    columns: dict[str, Any] = {"layer": layer, "module": [modules[index] for index in layer], "head": head}
    for name in names:
        values = np.asarray(getattr(result, name))
        columns[name] = values[(layer, head)[: values.ndim]]
    frame = pd.DataFrame(columns)
    frame.attrs["skipped"] = result.provenance.get("skipped", {})
    return frame


def layer_summary(frame: pd.DataFrame, columns: Mapping[str, pd.Series]) -> pd.DataFrame:
    """One row a layer, of columns that were grouped by it; `attrs` as those of the table of heads."""
    summary = pd.DataFrame(columns).reset_index()
    summary.attrs = frame.attrs
    return summary


def _table(layers: list[Float[np.ndarray, "value head"]]) -> Float[np.ndarray, "value layer head"]:
    """A row a layer, filled up with NaN where a layer has fewer heads than another."""
    table = np.full((len(layers[0]), len(layers), max(layer.shape[1] for layer in layers)), np.nan)
    for index, layer in enumerate(layers):
        table[:, index, : layer.shape[1]] = layer
    return table
