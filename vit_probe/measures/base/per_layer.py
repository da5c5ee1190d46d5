"""`layer_measure`: a measure that is any number per layer, declared by one function of the patch tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from vit_probe.errors import InputError
from vit_probe.measures.base.averaged import AveragedResult, AveragingMeasure
from vit_probe.measures.base.discovery import SHARED_OPTIONS
from vit_probe.measures.base.hidden_states import HiddenStateMeasure
from vit_probe.measures.base.option_types import keywords_only
from vit_probe.measures.base.reduce import check_values, read_only
from vit_probe.measures.base.registry import MeasureFunction, name_of, register
from vit_probe.results import KeyNumber
from vit_probe.runner.run import AttentionRun
from vit_probe.tokens.grid import TokenGrid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LayerMeasure", "LayerResult", "layer_measure"]

Values = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LayerResult(AveragedResult):
    """Named values of the patch tokens after each block, means over images.

    Values are (layer), or (layer, axis) with NaN where a layer has fewer entries.

    Args:
        axis: Name of the second axis of the values, such as `frequency`; None where a layer has one number.
        axis_label: What figures call it.
    """

    axis: str | None
    axis_label: str | None

    def __post_init__(self) -> None:
        """Raise InputError if the parts of the result do not fit together, or a layer has no value."""
        super().__post_init__()
        values = self.values[self.main]
        if (empty := np.isnan(values.reshape(len(values), -1)).all(axis=1)).any():
            raise InputError(f"layer {int(empty.argmax())} has no value: {self.main} is NaN throughout")

    def to_dataframe(self, *, per_image: bool = False) -> pd.DataFrame:
        """One row per layer, or per layer and entry of the axis: layer, module, the axis if there is one, the first value with
        its `std` and `confidence`, the other values, num_images.

        Args:
            per_image: Return one row per image and layer instead: image, name, layer, module, the axis and the values.

        Raises:
            InputError: If the values of single images are asked for and were not kept.
        """
        places = np.nonzero(~np.isnan(self.values[self.main]))
        columns = {"layer": places[0], "module": np.asarray(self.modules, dtype=object)[places[0]]}
        if self.axis is not None:
            columns[self.axis] = places[1]
        if per_image:
            return self._table_per_image(columns, places, *self.values)
        return self._table(columns, places, *self.values).assign(num_images=self.num_images)

    def summary(self) -> pd.DataFrame:
        """One row per layer: the values; of an axis, those at its first, middle and last entry."""
        if self.axis is None:
            frame = pd.DataFrame({"layer": np.arange(len(self.modules)), **self.values})
            return frame.rename(columns={self.main: f"{self.main.replace('_', ' ')} ({self.unit})"})
        last = self.values[self.main].shape[1] - 1
        entries = dict.fromkeys((0, last // 2, last))
        columns = {f"{self.axis} {entry}": self.values[self.main][:, entry] for entry in entries}
        return pd.DataFrame({"layer": np.arange(len(self.modules)), **columns})

    def key_numbers(self) -> list[KeyNumber]:
        """The first value after the first and the last layer; of an axis, at the layer's last entry."""
        # A layer of fewer patches has fewer entries, and NaN behind them.
        values = self.values[self.main].reshape(len(self.modules), -1)
        first, last = (layer[~np.isnan(layer)][-1] for layer in (values[0], values[-1]))
        return [("after the first layer", self.unit, float(first)), ("after the last layer", self.unit, float(last))]

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Draw the first value against depth, with its confidence interval; of an axis, one line per layer."""
        from vit_probe.plots.per_layer import plot_layers

        label = f"{self.label} ({self.unit})"
        axis = {"axis": self.axis, "axis_label": self.axis_label}
        return plot_layers(self.to_dataframe(), column=self.main, label=label, ax=ax, **axis)


@keywords_only
def layer_measure(
    *,
    unit: str,
    reference: str,
    axis: str | None = None,
    axis_label: str | None = None,
    name: str | None = None,
    label: str | None = None,
    command: str | None = None,
    result: type[LayerResult] = LayerResult,
) -> Callable[[Callable[..., Values]], MeasureFunction[LayerResult]]:
    """Make a measure of any numbers that follow from the patch tokens of each image after each block.

    The decorated function is given the tokens (image, patch, dim) and the `TokenGrid` of their layer, and returns named values
    (image) or, with an axis, (image, axis); keyword-only arguments are options of the measure. Means over images with standard
    deviation and confidence interval, table, plot, resuming and several processes follow.

    Args:
        unit: Of the first value.
        reference: Where the measure is from.
        axis: Name of the second axis of the values.
        axis_label: What figures call it; its name if None.
        name: Of the measure; the function's name if None.
        label: What figures call the first value; the measure's name in words if None.
        command: Name of the command of a measure in `vit_probe/measures`; the file's name with hyphens if None.
        result: Class of the result.

    Examples:
        >>> import torch
        >>> @layer_measure(unit="norm", reference="an example")
        ... def mean_norm(tokens, grid):
        ...     '''Mean Euclidean norm of the patch tokens.'''
        ...     return {"mean_norm": tokens.norm(dim=-1).mean(dim=-1)}
        >>> from vit_probe import load_model
        >>> mean_norm(load_model("demo"), torch.zeros(1, 3, 64, 64)).mean_norm.shape
        (9,)
    """

    def decorate(function: Callable[..., Values]) -> MeasureFunction[LayerResult]:
        own = name_of(function) if name is None else name

        def start(run: AttentionRun, *, per_image: bool, **options: Any) -> LayerMeasure:
            grids = [run.layout.grid_of(layer) for layer in range(len(run.layers))]
            chosen = partial(function, **options) if options else function
            return LayerMeasure(
                own,
                chosen,
                run.layers,
                grids,
                unit=unit,
                label=label,
                axis=axis,
                axis_label=axis_label,
                options=options,
                per_image=per_image,
                result=result,
            )

        public = register(function, result, start, name=own, shared=SHARED_OPTIONS["layer_measure"])
        public.reference = reference
        return public

    return decorate


class LayerMeasure(AveragingMeasure, HiddenStateMeasure):
    """The streaming measure that `layer_measure` declares.

    Args:
        name: Of the measure.
        function: Of the patch tokens and their grid.
        modules: Path of each layer's module.
        grids: Where the patches of each layer lie.
        unit: Of the first value.
        label: What figures call it.
        axis: Name of the second axis of the values.
        axis_label: What figures call it.
        options: Of the function.
        per_image: Whether to keep the value of every image.
        result: Class of the result.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Values],
        modules: Sequence[str],
        grids: Sequence[TokenGrid],
        *,
        unit: str,
        label: str | None = None,
        axis: str | None = None,
        axis_label: str | None = None,
        options: Mapping[str, Any] | None = None,
        per_image: bool = False,
        result: type[LayerResult] = LayerResult,
    ) -> None:
        self.name, self.display_name = name, f"values of {name}"
        HiddenStateMeasure.__init__(self, modules)
        AveragingMeasure.__init__(self, self.display_name, options or {}, per_image=per_image)
        self._function, self._grids, self._unit, self._axis = function, list(grids), unit, axis
        self._axis_label = axis_label
        self._label = label or name.replace("_", " ").capitalize()
        self._result = result

    def merge(self, other: Self) -> None:
        """Add the images of `other`. Either may be empty.

        Raises:
            InputError: If `other` is of other layers or options.
        """
        self._check_alike(other)
        self._stats.merge(other._stats)

    def compute(
        self, provenance: dict[str, Any] | None = None, *, names: list[str] | None = None, images: np.ndarray | None = None
    ) -> LayerResult:
        """The result over all images so far.

        Raises:
            InputError: If there were none.
        """
        averages = self._stats.averages()
        return self._result(
            measure=self.name,
            unit=self._unit,
            label=self._label,
            axis=self._axis,
            axis_label=self._axis_label,
            **averages.fields(names),
            modules=list(self.modules),
            options=self.options,
            provenance=provenance or {},
        )

    def begin_batch(self) -> None:
        """Remember the present state for `roll_back`."""
        super().begin_batch()
        self._stats.set_checkpoint()

    def roll_back(self) -> None:
        """Forget everything since `begin_batch`."""
        super().roll_back()
        self._stats.roll_back()

    def _reduced(self, tokens: Float[Tensor, "image patch dim"]) -> dict[str, np.ndarray]:
        layer = len(self._batch)
        with read_only(tokens, self.name):
            values = check_values(self._function(tokens, self._grids[layer]))
        if self._axis in values:
            raise InputError(
                f"a value of {self.name} is called {self._axis!r} like its axis; choose another name for one of them"
            )
        axes = 1 if self._axis is None else 2
        shape = next(iter(values.values())).shape
        for name, one in values.items():
            if one.ndim != axes or len(one) != len(tokens) or one.shape != shape:
                expected = f"({len(tokens)},)" if self._axis is None else f"({len(tokens)}, {self._axis})"
                raise InputError(
                    f"the value {name!r} of {self.name} has shape {tuple(one.shape)}; all values must be {expected}"
                )
        return {name: one.cpu().double().numpy() for name, one in values.items()}

    def _add(self, batch: list[dict[str, np.ndarray]], images: int) -> None:
        for layer, values in enumerate(batch):
            self._stats.add(layer, self.modules[layer], values)
