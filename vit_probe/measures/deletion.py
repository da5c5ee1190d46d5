"""Deletion: how a classifier's probability falls as the patches with the highest values of a map are deleted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vit_probe.attention.intercept import evaluation_mode
from vit_probe.attention.wrappers import unwrap
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.data.stream import Images, ImageStream
from vit_probe.errors import InputError
from vit_probe.measures.base.running_stats import RunningStats
from vit_probe.results import Result, check_finite, software_versions
from vit_probe.runner.run import model_provenance
from vit_probe.tokens.grid import TokenGrid, first_parameter
from vit_probe.tokens.locate import locate_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DeletionResult", "deletion"]

RANDOM = "random"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DeletionResult(Result):
    """The probability of each image's predicted class as its patches are deleted, in several orders.

    Args:
        probability: (order, image, step).
        fractions: (step), the fraction of the patches that is deleted, from 0 to 1.
        predicted: (image), the class that the model predicts for the whole image.
        orders: Name of each order; the last is `random`.
        names: Name of each image.
    """

    measure: str = "deletion"
    probability: Float[np.ndarray, "order image step"]
    fractions: Float[np.ndarray, "step"]
    predicted: Int[np.ndarray, "image"]
    orders: Annotated[list[str], "order"]
    names: Annotated[list[str], "image"]

    @property
    def area(self) -> pd.DataFrame:
        """One row per image, one column per order: the area under the curve, which is the mean probability during deletion.

        The lower it is, the sooner the patches were deleted on which the prediction rests.
        """
        return pd.DataFrame(dict(zip(self.orders, np.trapezoid(self.probability, self.fractions, axis=-1), strict=True)))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per order, image and step: order, image, name, predicted, fraction, probability."""
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
        """One row per order: mean area over images, by how much it is below that of the random order, and half the width of the
        95 % confidence interval of this difference.
        """
        area = self.area
        below = RunningStats.from_samples(area[[RANDOM]].to_numpy() - area.to_numpy())
        columns = {"area": area.mean().to_numpy(), "below random": below.mean, "confidence": below.confidence()}
        return pd.DataFrame({"order": self.orders} | columns)

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Draw the mean probability against the fraction of the patches that is deleted, one line per order."""
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
    """Delete each image's patches, those with the highest values of a map first, and measure the predicted class's probability.

    If a map shows what the model's decision rests on, the probability falls sooner than in a random order. A patch is deleted
    by replacing it with the image's mean colour, a choice that the papers leave open. The class is the one that the model
    predicts for the whole image, right or wrong. Patches are deleted in `steps` equal parts, rounded to whole patches; of equal
    values, those further up go first, then those further left. Each image has a random order of its own.

    Args:
        model: A classifier: its output, or the `logits` of its output, are scores of classes. It runs on its own device.
        images: Photographs, paths, a preprocessed tensor (batch, channel, height, width), or an iterable of such batches.
        maps: By name of the order, one value per image and patch, such as rollout; `-maps` reverses the order.
        steps: Number of parts in which the patches are deleted.
        seed: Seed of the random orders.
        preprocessing: How photographs are prepared; the model's own if None.
        batch_size: Images per forward pass.

    Raises:
        InputError: If the model is not a classifier, a map does not fit the images or the model's patches, is not finite or is
            called `random`, or the images cannot be used.

    Examples:
        >>> from vit_probe import attention_rollout, load_model, sample_photographs
        >>> model, photographs = load_model("demo"), sample_photographs(2)
        >>> result = deletion(model, photographs, {"rollout": attention_rollout(model, photographs).maps}, steps=2)
        >>> result.orders, result.probability.shape
        (['rollout', 'random'], (2, 2, 3))

    References:
        Petsiuk et al. 2018, arXiv:1806.07421, section 4.2 (deletion metric, of pixels); Samek et al. 2017, arXiv:1509.06321
        (of regions, compared with random orders).
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    if RANDOM in maps:
        raise InputError(f"a map is called {RANDOM!r}, which is the name of the random order; give it another name")
    stream = ImageStream(images, preprocessing or getattr(unwrap(model), "preprocessing", None), batch_size=batch_size)
    grid = locate_tokens(model, *stream.image_size).grid
    values = {name: _checked(name, one, grid, stream.count) for name, one in maps.items()}
    counts = np.round(np.arange(steps + 1) * grid.num_patches / steps).astype(int)
    parameter = first_parameter(model)
    batches: list[np.ndarray] = []
    predicted: list[np.ndarray] = []
    with evaluation_mode(model):
        for batch in stream:
            which = range(len(stream.names) - len(batch), len(stream.names))
            for name, one in values.items():
                _check_count(name, one[: which.stop], which.stop)
            ranks = [_ranks(one[which.start : which.stop]) for one in values.values()]
            ranks.append(np.stack([np.random.default_rng([seed, index]).permutation(grid.num_patches) for index in which]))
            inputs = batch.to(parameter)  # its device and dtype
            whole = _probabilities(model, inputs)
            predicted.append(whole.argmax(axis=1))
            batches.append(_curves(model, inputs, whole, np.stack(ranks), counts, grid))
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
    """The probabilities of the classes that are predicted for the whole images, in float64."""
    image, predicted = np.arange(len(images)), whole.argmax(axis=1)
    colour = images.mean(dim=(-2, -1), keepdim=True)
    curves = np.empty((len(ranks), len(images), len(counts)))
    for order, rank in enumerate(ranks):
        curves[order, :, 0] = whole[image, predicted]
        for step, count in enumerate(counts[1:], start=1):
            deleted = _pixels(rank < count, grid, images)
            curves[order, :, step] = _probabilities(model, torch.where(deleted, colour, images))[image, predicted]
    return curves


def _pixels(patches: Bool[np.ndarray, "image patch"], grid: TokenGrid, images: Tensor) -> Bool[Tensor, "image 1 height width"]:
    """The pixels of some patches of each image; pixels beyond the last patch belong to none."""
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
    if fits and scores is output:  # a plain tensor may be features, unless its width is the model's number of classes
        model = unwrap(model)
        classes = getattr(model, "num_classes", None) or getattr(getattr(model, "config", None), "num_classes", None)
        fits = scores.shape[1] == classes
    if not fits:
        raise InputError(f"{type(model).__name__} does not return scores of classes; pass a model with a classification head")
    return torch.softmax(scores.double().cpu(), dim=1).numpy()


def _ranks(values: Float[np.ndarray, "image row col"]) -> Int[np.ndarray, "image patch"]:
    """The rank of each patch, 0 for the largest value."""
    order = np.argsort(-values.reshape(len(values), -1), axis=1, kind="stable")
    return np.argsort(order, axis=1, kind="stable")


def _checked(name: str, maps: np.ndarray, grid: TokenGrid, count: int | None) -> np.ndarray:
    values = np.asarray(maps, dtype=np.float64)
    if values.shape[1:] != (grid.rows, grid.cols):
        raise InputError(f"maps of {name} have shape {values.shape}; they must be (image, {grid.rows}, {grid.cols})")
    if count is not None:
        _check_count(name, values, count)
    if not np.isfinite(values).all():
        raise InputError(f"maps of {name} contain values that are not finite; check the model's weights and images")
    return values


def _check_count(name: str, maps: np.ndarray, images: int) -> None:
    if len(maps) != images:
        raise InputError(f"got {len(maps)} maps of {name} for {images} images or more; pass one map per image")
