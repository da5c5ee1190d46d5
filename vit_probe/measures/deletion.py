"""Deletion: how a classifier's probability falls as the patches that a map ranks highest are taken away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vit_probe.attention.intercept import evaluated
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.data.stream import Images, ImageStream
from vit_probe.errors import InputError
from vit_probe.measures.base.running_stats import RunningStats
from vit_probe.results import Result, check_finite, software_versions
from vit_probe.runner.run import model_provenance
from vit_probe.tokens.grid import TokenGrid, first_parameter
from vit_probe.tokens.locate import find_token_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DeletionResult", "deletion"]

RANDOM = "random"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DeletionResult(Result):
    """The probability of each image's predicted class while its patches are taken away in several orders.

    Args:
        probability: (order, image, step).
        fractions: (step), the part of the patches that is taken away, from 0 to 1.
        predicted: (image), the class to which the whole image is assigned.
        orders: Name of each order; the last is `random`.
        names: Name of each image.
    """

    probability: np.ndarray
    fractions: np.ndarray
    predicted: np.ndarray
    orders: list[str]
    names: list[str]

    @property
    def area(self) -> pd.DataFrame:
        """One row an image, one column an order: the area under the curve, which is the mean probability on the way. The lower
        it is, the sooner the patches that the prediction rests on were taken away.
        """
        return pd.DataFrame(dict(zip(self.orders, np.trapezoid(self.probability, self.fractions, axis=-1), strict=True)))

    def to_dataframe(self) -> pd.DataFrame:
        """One row a step of an image in an order: order, image, name, predicted, fraction, probability."""
        order, image, step = (index.ravel() for index in np.indices(self.probability.shape))
        return pd.DataFrame(
            {
                "order": np.asarray(self.orders, dtype=object)[order],
                "image": image,
                "name": np.asarray(self.names, dtype=object)[image],
                "predicted": self.predicted[image],
                "fraction": self.fractions[step],
                "probability": self.probability.ravel(),
            }
        )

    def summary(self) -> pd.DataFrame:
        """One row an order: mean area over images, how much it is below that of the random order, and half the width of the
        95 % confidence interval of that difference.
        """
        area = self.area
        below = RunningStats.from_samples(area[[RANDOM]].to_numpy() - area.to_numpy())
        columns = {"area": area.mean().to_numpy(), "below random": below.mean, "confidence": below.confidence()}
        return pd.DataFrame({"order": self.orders} | columns)

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Mean probability against the part of the patches that is taken away, a line an order."""
        from vit_probe.plots.deletion import plot_deletion

        return plot_deletion(self.to_dataframe(), ax=ax)


def deletion(
    model: nn.Module,
    images: Images,
    maps: Mapping[str, Float[np.ndarray, "image row col"]],
    *,
    steps: int = 8,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 16,
) -> DeletionResult:
    """Takes each image's patches away, those first to which a map gives most, and watches the predicted class's probability.

    A map that shows what the model's decision rests on makes the probability fall sooner than a random order does. A patch is
    taken away by painting it in the image's mean colour, which the papers leave open; the class is the one that the model
    predicts for the whole image, right or wrong. Patches go in `steps` equal parts, rounded to whole patches. Of equal values
    those go first that are further up, then further left. The random order is another one for each image.

    Args:
        model: A classifier: its output, or the `logits` of its output, are scores of classes. It runs on its own device.
        images: Photographs, paths, a preprocessed tensor (batch, channel, height, width), or an iterable of such batches.
        maps: For each order its name, and a value for every patch of every image, such as rollout; `-maps` turns it round.
        steps: Parts in which the patches are taken away.
        seed: Of the random orders.
        preprocessing: How photographs are prepared; the model's own if None.
        batch_size: Images a forward pass.

    Raises:
        InputError: If the model is no classifier, a map does not fit the images or the model's patches, is not finite or is
            called `random`, or the images cannot be used.

    References:
        Petsiuk et al. 2018, arXiv:1806.07421, section 4.2 (pixels, by the deletion metric); Samek et al. 2017, arXiv:1509.06321
        (regions, and random orders beside).
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    if RANDOM in maps:
        raise InputError(f"a map is called {RANDOM!r}, as the random order is; give it another name")
    stream = ImageStream(images, preprocessing or getattr(model, "preprocessing", None), batch_size=batch_size)
    grid = find_token_grid(model, *stream.image_size)
    values = {name: _checked(name, one, grid, stream.count) for name, one in maps.items()}
    counts = np.round(np.arange(steps + 1) * grid.num_patches / steps).astype(int)
    home = first_parameter(model)
    batches: list[np.ndarray] = []
    predicted: list[np.ndarray] = []
    with evaluated(model):
        for batch in stream:
            which = range(len(stream.names) - len(batch), len(stream.names))
            for name, one in values.items():
                _check_count(name, one[: which.stop], which.stop)
            ranks = [_ranks(one[which.start : which.stop]) for one in values.values()]
            ranks.append(np.stack([np.random.default_rng([seed, index]).permutation(grid.num_patches) for index in which]))
            shown = batch.to(home)
            whole = _probabilities(model, shown)
            predicted.append(whole.argmax(axis=1))
            batches.append(_curves(model, shown, whole, np.stack(ranks), counts, grid))
    for name, one in values.items():
        _check_count(name, one, len(stream.names))
    probability = np.concatenate(batches, axis=1)
    check_finite(probability, "class probabilities")
    return DeletionResult(
        probability=probability,
        fractions=counts / grid.num_patches,
        predicted=np.concatenate(predicted),
        orders=[*values, RANDOM],
        names=stream.names,
        provenance={
            "model": model_provenance(model),
            "images": stream.provenance(),
            "preprocessing": asdict(stream.preprocessing) if stream.preprocessing else None,
            "grid": asdict(grid),
            "options": {"steps": steps, "seed": seed, "orders": [*values, RANDOM]},
            "versions": software_versions(),
        },
    )


def _curves(
    model: nn.Module,
    images: Float[Tensor, "image channel height width"],
    whole: Float[np.ndarray, "image class"],
    ranks: Int[np.ndarray, "order image patch"],
    counts: Int[np.ndarray, "step"],
    grid: TokenGrid,
) -> Float[np.ndarray, "order image step"]:
    """The probabilities of the classes that are most probable for the whole images, in float64."""
    image, of_class = np.arange(len(images)), whole.argmax(axis=1)
    colour = images.mean(dim=(-2, -1), keepdim=True)
    curves = np.empty((len(ranks), len(images), len(counts)))
    for order, rank in enumerate(ranks):
        curves[order, :, 0] = whole[image, of_class]
        for step, count in enumerate(counts[1:], start=1):
            away = _pixels(rank < count, grid, images)
            curves[order, :, step] = _probabilities(model, torch.where(away, colour, images))[image, of_class]
    return curves


def _pixels(patches: Bool[np.ndarray, "image patch"], grid: TokenGrid, images: Tensor) -> Bool[Tensor, "image 1 height width"]:
    """Where an image's patches are; pixels beyond the last patch are in none."""
    (height, width), (patch_height, patch_width) = images.shape[-2:], grid.patch_size
    squares = patches.reshape(-1, grid.rows, grid.cols).repeat(patch_height, axis=1).repeat(patch_width, axis=2)
    whole = np.zeros((len(squares), height, width), dtype=bool)
    covered = whole[:, : squares.shape[1], : squares.shape[2]]
    covered[:] = squares[:, : covered.shape[1], : covered.shape[2]]
    return torch.from_numpy(whole)[:, None].to(images.device)


def _probabilities(model: nn.Module, images: Tensor) -> Float[np.ndarray, "image class"]:
    output = model(images)
    scores = getattr(output, "logits", output)
    fits = isinstance(scores, Tensor) and scores.ndim == 2
    if fits and scores is output:  # what has no such name is features unless the model says how many classes it knows
        classes = getattr(model, "num_classes", None) or getattr(getattr(model, "config", None), "num_classes", None)
        fits = scores.shape[1] == classes
    if not fits:
        raise InputError(f"{type(model).__name__} returns no scores of classes; pass a model with a classification head")
    return torch.softmax(scores.double().cpu(), dim=1).numpy()


def _ranks(values: Float[np.ndarray, "image row col"]) -> Int[np.ndarray, "image patch"]:
    """For each patch its place in the order, the largest value first."""
    order = np.argsort(-values.reshape(len(values), -1), axis=1, kind="stable")
    return np.argsort(order, axis=1, kind="stable")


def _checked(name: str, maps: np.ndarray, grid: TokenGrid, count: int | None) -> np.ndarray:
    values = np.asarray(maps, dtype=np.float64)
    if values.shape[1:] != (grid.rows, grid.cols):
        raise InputError(f"maps of {name} have shape {values.shape}; they must be (image, {grid.rows}, {grid.cols})")
    if count is not None:
        _check_count(name, values, count)
    if not np.isfinite(values).all():
        raise InputError(f"maps of {name} hold values that are not finite; check the model's weights and images")
    return values


def _check_count(name: str, maps: np.ndarray, images: int) -> None:
    if len(maps) != images:
        raise InputError(f"{len(maps)} maps of {name} came with {images} images or more; give one an image")
