"""What averages over images have in common: their streaming measures, and their results with spread and single images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from vit_probe.errors import InputError
from vit_probe.measures.base.running_stats import LayerStats
from vit_probe.results import Result

__all__ = ["AveragedResult", "AveragingMeasure"]


class AveragingMeasure:
    """The part of a streaming measure whose state is `LayerStats`, whatever is averaged.

    Args:
        display_name: What is measured, for messages.
        options: What distinguishes this measure from others of its name, for provenance.
        per_image: Whether to keep the value of every image.
    """

    def __init__(self, display_name: str, options: Mapping[str, Any], *, per_image: bool) -> None:
        self.per_image = per_image
        self._options = dict(options)
        self._stats = LayerStats(display_name, per_image=per_image)

    @property
    def options(self) -> dict[str, Any]:
        """What distinguishes this measure from others of its name, for provenance."""
        return self._options | ({"per_image": True} if self.per_image else {})

    def state(self) -> dict[str, Any]:
        """What `restore` needs to continue from here: arrays, and what JSON can hold."""
        return self._stats.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to where `state` was taken, of a measure of the same model with the same options."""
        self._stats.restore(state)

    def reorder(self, order: Sequence[int]) -> None:
        """Put the values of single images into another order: first those of the image that was the `order[0]`-th."""
        self._stats.reorder(order)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AveragedResult(Result):
    """Named values, averaged over images, with one or more axes of which the first is the layer.

    Each named value is an attribute, too: `result.distance` is `result.values["distance"]`.

    Args:
        unit: Unit of the first value.
        label: What figures call the first value.
        values: By name, (layer, ...); the first is what the measure is about. NaN where a layer is smaller than others.
        std: By name, standard deviation over images of an image's value (n - 1; NaN for one image).
        confidence: By name, half the width of the 95 % confidence interval of the mean over all images that these are drawn
            from (Student's t; NaN for one image).
        per_image: By name, (image, layer, ...), the value of every image; empty unless `per_image=True` was given.
        names: Name of each image; empty unless `per_image=True` was given.
        modules: Path of each layer's module.
        num_images: Number of images averaged over.
        options: Options of the measure.
    """

    unit: str
    label: str
    values: dict[str, Float[np.ndarray, "layer ..."]]
    std: dict[str, Float[np.ndarray, "layer ..."]]
    confidence: dict[str, Float[np.ndarray, "layer ..."]]
    per_image: dict[str, Float[np.ndarray, "image layer ..."]]
    names: Annotated[list[str], "image"]
    modules: Annotated[list[str], "layer"]
    num_images: int
    options: dict[str, Any]

    def __post_init__(self) -> None:
        """Raise InputError if the parts of the result do not fit together."""
        super().__post_init__()
        values, std, confidence, per_image = (
            {name: array.shape for name, array in part.items()}
            for part in (self.values, self.std, self.confidence, self.per_image)
        )
        kept = {name: (self.num_images, *shape) for name, shape in values.items()} if per_image else {}
        num_names = self.num_images if per_image else 0
        if not values or (std, confidence, per_image, len(self.names)) != (values, values, kept, num_names):
            raise InputError(
                f"values of shapes {values} do not fit standard deviations {std}, confidence intervals {confidence} and values "
                f"per image {per_image} of {self.num_images} images with {len(self.names)} names"
            )

    def __getattr__(self, name: str) -> np.ndarray:
        """The named value."""
        # Copying and unpickling ask for attributes before there are any fields.
        values: dict[str, np.ndarray] = self.__dict__.get("values", {})
        if name in values:
            return values[name]
        raise AttributeError(f"{type(self).__name__} of {self.__dict__.get('measure')} has no value {name!r}")

    @property
    def main(self) -> str:
        """Name of the first value."""
        return next(iter(self.values))

    @property
    def panel_title(self) -> str:
        """Title of the result's panel in the overview."""
        return f"{self.measure.replace('_', ' ').capitalize()}\n({self.unit})"

    def _table(self, columns: Mapping[str, np.ndarray], places: tuple[np.ndarray, ...], *names: str) -> pd.DataFrame:
        """One row per place: the columns, the first of the named values with `std` and `confidence`, the others.

        Args:
            columns: What tells the places apart.
            places: Where they lie in the arrays of the values.
            names: Values of that shape.
        """
        frame = pd.DataFrame(columns)
        for index, name in enumerate(names):
            frame[name] = self.values[name][places]
            if index == 0:
                frame["std"], frame["confidence"] = self.std[name][places], self.confidence[name][places]
        return frame

    def _table_per_image(self, columns: Mapping[str, np.ndarray], places: tuple[np.ndarray, ...], *names: str) -> pd.DataFrame:
        """One row per image and place: image, name, the columns, the named values.

        Raises:
            InputError: If the values of single images were not kept.
        """
        if not self.per_image:
            raise InputError("the values of single images were not kept; measure with per_image=True")
        image = np.repeat(np.arange(self.num_images), len(places[0]))
        frame = pd.DataFrame({"image": image, "name": np.asarray(self.names, dtype=object)[image]})
        for column, values in columns.items():
            frame[column] = np.tile(values, self.num_images)
        for name in names:
            frame[name] = np.concatenate([of_image[places] for of_image in self.per_image[name]])
        return frame
