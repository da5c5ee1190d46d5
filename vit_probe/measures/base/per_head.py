"""Measures with a number, or several, for every head: the streaming measure and its result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from vit_probe.attention.tiles import AttentionTile
from vit_probe.errors import InputError
from vit_probe.measures.base.averaged import AveragedResult, AveragingMeasure
from vit_probe.results import KeyNumber
from vit_probe.runner.resume import differing
from vit_probe.tokens.grid import TokenGrid, Windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["HeadMeans", "HeadResult", "PerHead", "head_table"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class HeadResult(AveragedResult):
    """Named values of every head, means over images and patch queries.

    Values are (layer, head, ...), NaN where a layer has fewer heads than others. `result.uniform_distance` is
    `result.uniform["distance"]`.

    Args:
        uniform: By name, (layer), the value of a head that attends equally to all tokens that it may attend to.
        num_windows: (layer), windows that attention is kept within; 1 where it is over the whole image.
    """

    uniform: dict[str, Float[np.ndarray, "layer"]]
    num_windows: Int[np.ndarray, "layer"]

    def __post_init__(self) -> None:
        """Raise InputError if the parts of the result do not fit together, or no head has any value."""
        super().__post_init__()
        if self.main not in self.uniform:
            raise InputError(f"uniform attention has values of {', '.join(self.uniform) or 'nothing'}, but not of {self.main}")
        if all(np.isnan(values).all() for values in self.values.values() if values.ndim == 2):
            raise InputError(f"no head has a value: {', '.join(self.values)} are NaN throughout")

    def __getattr__(self, name: str) -> np.ndarray:
        """The named value; `uniform_NAME` is what uniform attention has."""
        uniform: dict[str, np.ndarray] = self.__dict__.get("uniform", {})
        if name.startswith("uniform_") and name.removeprefix("uniform_") in uniform:
            return uniform[name.removeprefix("uniform_")]
        return super().__getattr__(name)

    def to_dataframe(self, *, per_image: bool = False) -> pd.DataFrame:
        """One row per head: layer, module, head, the first value with its `std` and `confidence`, the other values, the first
        value of uniform attention (`uniform_NAME`), num_windows, num_images. Maps are left out.

        Where attention on patches is rescaled, queries whose weights on patches all round to 0 are left out of the mean.
        `excluded` is their share; there is no such column where there are none.

        Its `attrs["skipped"]` names the attention of the model that is not in the table, with the reason (such as that it is
        not self-attention). `attrs["unfused"]` names the layers whose attention was seen at a softmax in the model's own code.

        Args:
            per_image: Return one row per image, layer and head instead: image, name, layer, module, head and the values.

        Raises:
            InputError: If the values of single images are asked for and were not kept.
        """
        scalars = [name for name, values in self.values.items() if values.ndim == 2]
        if "excluded" in scalars and not np.nansum(self.values["excluded"]):
            scalars.remove("excluded")
        # A head of which every query is excluded has no first value, but others.
        layer, head = np.nonzero(np.any([~np.isnan(values) for values in self.values.values() if values.ndim == 2], axis=0))
        columns = {"layer": layer, "module": np.asarray(self.modules, dtype=object)[layer], "head": head}
        if per_image:
            return self._table_per_image(columns, (layer, head), *scalars)
        frame = self._table(columns, (layer, head), *scalars)
        if scalars and scalars[0] in self.uniform:
            frame[f"uniform_{scalars[0]}"] = self.uniform[scalars[0]][layer]
        frame["num_windows"], frame["num_images"] = self.num_windows[layer], self.num_images
        frame.attrs["skipped"] = self.provenance.get("skipped", {})
        frame.attrs["unfused"] = self.provenance.get("unfused", [])
        return frame

    def summary(self) -> pd.DataFrame:
        """One row per layer: mean and range over heads of the first value, and the means of the others; `attrs` as in the
        table.
        """
        frame = self.to_dataframe()
        layers = frame.groupby("layer")
        first, *others = [name for name in self.values if name in frame]
        words = first.replace("_", " ")
        columns = {
            f"mean {words} ({self.unit})": layers[first].mean(),
            "lowest head": layers[first].min(),
            "highest head": layers[first].max(),
            **{name.replace("_", " "): layers[name].mean() for name in others},
        }
        if (self.num_windows > 1).any():
            columns["windows"] = layers["num_windows"].first()
        summary = pd.DataFrame(columns).reset_index()
        summary.attrs = frame.attrs
        return summary

    def key_numbers(self) -> list[KeyNumber]:
        """Range of the first value over heads, within layers, and of uniform attention; the means of the others."""
        values = self.values[self.main]
        values = values[~np.isnan(values).all(axis=1)]  # in a layer where every query is excluded no head has the first value
        if not len(values):
            return []
        lowest, highest = np.nanmin(values, axis=1), np.nanmax(values, axis=1)
        return [
            ("lowest head", self.unit, float(lowest.min())),
            ("highest head", self.unit, float(highest.max())),
            ("range of heads", self.unit, float(highest.max() - lowest.min())),
            ("range within a layer", self.unit, float((highest - lowest).mean())),
            ("uniform attention", self.unit, float(self.uniform[self.main].mean())),
            # Patch mass says how far to trust the first value; models are not compared by it.
            *(
                (name.replace("_", " "), "share", float(np.nanmean(values)))
                for name, values in self.values.items()
                if values.ndim == 2 and name not in (self.main, "patch_mass", "excluded") and not np.isnan(values).all()
            ),
        ]

    def plot(
        self,
        *,
        ax: Axes | None = None,
        kind: Literal["depth", "sorted"] = "depth",
        layers: Sequence[int] | None = None,
        spread: bool = False,
    ) -> Axes:
        """Draw the first value of every head.

        Args:
            ax: Where to draw; a new figure if None.
            kind: Against depth, one dot per head; or the heads of some layers sorted by their value, one line per layer.
            layers: Which layers to draw, from 0; if None, all, or of sorted heads the first two and the last two.
            spread: Add error bars of one standard deviation over images.
        """
        from vit_probe.plots.per_head import plot_heads, plot_sorted_heads

        quantity = {"column": self.main, "label": f"{self.label} ({self.unit})"}
        if kind == "sorted":
            return plot_sorted_heads(self.to_dataframe(), layers=layers, ax=ax, **quantity)
        return plot_heads(self.to_dataframe(), layers=layers, ax=ax, spread=spread, **quantity)


class HeadMeans(Protocol):
    """What makes one value per image and head of tiles."""

    def add(self, tile: AttentionTile) -> dict[str, Float[np.ndarray, "image head *values"]] | None: ...


class PerHead(AveragingMeasure, ABC):
    """A streaming measure with some values for every head; an observer for `attention_hooks`.

    Args:
        grid: Where the patches lie.
        windows: The layers whose attention is not over all the tokens of `grid`; see `vit_probe.tokens.locate.locate_tokens`.
        options: What distinguishes this measure from others of its name, for provenance.
        per_image: Whether to keep the value of every image.
    """

    name: str
    unit: str
    label: str
    result: type[HeadResult] = HeadResult

    def __init__(
        self,
        grid: TokenGrid,
        windows: Mapping[int, Windows] | None,
        options: Mapping[str, Any],
        *,
        per_image: bool = False,
    ) -> None:
        self.grid = grid
        self.windows = dict(windows or {})
        super().__init__(self.display_name, options, per_image=per_image)
        self._means = self._head_means()

    @property
    def display_name(self) -> str:
        """What is measured, for messages."""
        return f"values of {self.name}"

    @abstractmethod
    def _head_means(self) -> HeadMeans:
        """What reduces tiles to one value per image and head."""

    @abstractmethod
    def _uniform(self, layer: int) -> Mapping[str, float]:
        """Values of uniform attention in a layer."""

    def _uniform_by_layer(self, layers: Sequence[int]) -> list[Mapping[str, float]]:
        # All pairs of tokens take part, so that layers with the same windows, or without, share what is computed.
        known: dict[int, Mapping[str, float]] = {}
        kinds = [id(self.windows.get(layer)) for layer in layers]
        for layer, kind in zip(layers, kinds, strict=True):
            if kind not in known:
                known[kind] = self._uniform(layer)
        return [known[kind] for kind in kinds]

    def update(self, tile: AttentionTile) -> None:
        """Add a tile. An image counts once the last query of its last window has come."""
        means = self._means.add(tile)
        if means is not None:
            name, first = next(iter(means.items()))
            if first.ndim != 2:
                raise InputError(
                    f"the first value of {self.name}, {name!r}, has shape {first.shape[2:]} per image and head; it must be a "
                    "single number, which tables and figures show, and arrays may follow"
                )
            self._stats.add(tile.layer, tile.name, means)

    def begin_batch(self) -> None:
        """Remember the present state for `roll_back`."""
        self._stats.set_checkpoint()

    def end_batch(self) -> None:
        """Finish the batch; nothing is left to do."""

    def roll_back(self) -> None:
        """Forget everything since `begin_batch`."""
        self._stats.roll_back()

    def merge(self, other: Self) -> None:
        """Add the images of `other`. Either may be empty.

        Raises:
            InputError: If `other` measures on another grid, in other windows, with other options, or other layers and heads.
        """
        mine, theirs = ((one.name, one.grid, one.options) for one in (self, other))
        if mine != theirs:
            raise InputError(f"cannot merge {self.display_name}: (name, grid, options) are {mine} and {theirs}")
        if self.windows.keys() != other.windows.keys() or any(
            self.windows[layer].grid != windows.grid or not torch.equal(self.windows[layer].patches, windows.patches)
            for layer, windows in other.windows.items()
        ):
            raise InputError(
                f"cannot merge {self.display_name} within other windows; measure images of one size with one model"
            )
        self._stats.merge(other._stats)

    def compute(
        self, provenance: dict[str, Any] | None = None, *, names: list[str] | None = None, images: np.ndarray | None = None
    ) -> HeadResult:
        """The result over all images so far.

        Raises:
            InputError: If there were none.
        """
        averages = self._stats.averages()
        layers = range(len(self._stats.modules))
        uniform = self._uniform_by_layer(layers)
        return self.result(
            measure=self.name,
            unit=self.unit,
            label=self.label,
            **averages.fields(names),
            uniform={name: np.array([layer[name] for layer in uniform]) for name in uniform[0]},
            num_windows=np.array([len(self.windows[layer].patches) if layer in self.windows else 1 for layer in layers]),
            modules=list(self._stats.modules),
            options=self.options,
            provenance=provenance or {},
        )


_HEAD = ("layer", "module", "head", "num_windows", "num_images")  # columns that say which head it is
_SAME = ("model", "images", "preprocessing", "grid", "windows", "skipped")  # in the provenance of results of one pass


def head_table(*results: HeadResult) -> pd.DataFrame:
    """Several measures of every head side by side, such as how far a head looks and how many tokens it looks at.

    The results are of the same pass: `measure(model, images, [mean_attention_distance, attention_entropy])` returns them.

    Returns:
        One row per head: layer, module, head, then the columns of each result, its `std` and `confidence` called
        `NAME_std` and `NAME_confidence`; num_images last. `attrs` as in the table of the first.

    Raises:
        InputError: If the results are of different models, layers, heads or images, or have different values of one name.
    """
    first = results[0]
    for other in results[1:]:
        mine, theirs = (
            {
                "layers": result.modules,
                "heads": result.values[result.main].shape[:2],
                "number of images": result.num_images,
                **{name: result.provenance.get(name) for name in _SAME},
            }
            for result in (first, other)
        )
        if names := differing(mine, theirs):
            raise InputError(
                f"results that differ in their {names} do not make one table; measure them in one pass, as "
                "measure(model, images, [mean_attention_distance, attention_entropy]) does"
            )
    frames = [
        result.to_dataframe().rename(columns={"std": f"{result.main}_std", "confidence": f"{result.main}_confidence"})
        for result in results
    ]
    table = frames[0]
    for frame in frames[1:]:
        shared = [name for name in frame.columns if name in table.columns and name not in _HEAD]
        table = table.merge(frame, on=list(_HEAD), suffixes=("", "_other"), validate="one_to_one")
        if unequal := [name for name in shared if not np.allclose(table[name], table[f"{name}_other"], equal_nan=True)]:
            raise InputError(
                f"results with different values of {', '.join(unequal)} do not make one table; head_table takes one result per "
                "measure"
            )
        table = table.drop(columns=[f"{name}_other" for name in shared])
    table["num_images"] = table.pop("num_images")  # last, as in the table of each
    table.attrs = frames[0].attrs
    return table
