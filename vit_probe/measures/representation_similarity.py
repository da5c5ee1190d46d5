"""Similarity of the representations of layers, within one model or between two: centred kernel alignment (CKA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor, nn

from vit_probe.data.preprocessing import Preprocessing
from vit_probe.data.stream import Images
from vit_probe.errors import InputError
from vit_probe.measures.base.hidden_states import HiddenStateMeasure
from vit_probe.measures.base.registry import streaming_measure
from vit_probe.measures.hsic import MIN_IMAGES, centred_pairs, inner_products
from vit_probe.results import KeyNumber, Result, check_finite
from vit_probe.runner.run import AttentionRun
from vit_probe.tokens.grid import TokenGrid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["RepresentationSimilarity", "RepresentationSimilarityResult", "check_same_images", "representation_similarity"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class RepresentationSimilarityResult(Result):
    """Centred kernel alignment (CKA) of all pairs of layers, of one model or of two.

    Args:
        similarity: (layer, other_layer), at most 1; estimates of small similarities may lie slightly below 0.
        modules: Path of each layer's module.
        other_modules: The same for the other model; equal to `modules` if there is only one model.
        num_images: Number of images that the similarity is computed from.
        num_batches: Number of batches that they came in.
        num_left_out: Number of images in batches of fewer than 4, which are ignored.
    """

    measure: str = "representation_similarity"
    similarity: Float[np.ndarray, "layer other_layer"]
    modules: Annotated[list[str], "layer"]
    other_modules: Annotated[list[str], "other_layer"]
    num_images: int
    num_batches: int
    num_left_out: int

    def __post_init__(self) -> None:
        """Raise InputError if a similarity is NaN or infinite."""
        super().__post_init__()
        check_finite(self.similarity, "similarities")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair of layers: layer, module, other_layer, other_module, similarity, num_images."""
        layer, other = (index.ravel() for index in np.indices(self.similarity.shape))
        columns = {
            "layer": layer,
            "module": [self.modules[index] for index in layer],
            "other_layer": other,
            "other_module": [self.other_modules[index] for index in other],
            "similarity": self.similarity.ravel(),
            "num_images": self.num_images,
        }
        return pd.DataFrame(columns)

    def summary(self) -> pd.DataFrame:
        """One row per layer: the most similar layer, its similarity, and the mean and lowest similarity.

        Within one model, the layer itself is excluded.
        """
        values = self.similarity.copy()
        if "other" not in self.provenance and values.shape[0] > 1:
            np.fill_diagonal(values, np.nan)
        return pd.DataFrame(
            {
                "layer": np.arange(len(values)),
                "most like": np.nanargmax(values, axis=1),
                "similarity": np.nanmax(values, axis=1),
                "mean": np.nanmean(values, axis=1),
                "lowest": np.nanmin(values, axis=1),
            }
        )

    def key_numbers(self) -> list[KeyNumber]:
        """The similarity of the first and the last layer, and the mean similarity of neighbouring layers."""
        neighbours = np.diagonal(self.similarity, 1)
        return [
            ("first and last layer", "CKA", float(self.similarity[0, -1])),
            ("neighbouring layers", "CKA", float(neighbours.mean()) if len(neighbours) else float("nan")),
        ]

    @property
    def panel_title(self) -> str:
        """Title of the result's panel in the overview."""
        return "Layers' similarity\n(CKA)"

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Draw the similarities, layer against layer, with the first layers at the lower left."""
        from vit_probe.plots.representation_similarity import plot_representation_similarity

        return plot_representation_similarity(self.similarity, ax=ax)


@streaming_measure(
    result=RepresentationSimilarityResult, start=lambda run, *, keep=False: RepresentationSimilarity(run.layers, keep=keep)
)
def representation_similarity(
    model: nn.Module,
    images: Images,
    other: nn.Module | None = None,
    *,
    grid: TokenGrid | None = None,
    other_grid: TokenGrid | None = None,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> RepresentationSimilarityResult:
    """Linear centred kernel alignment (CKA) of all pairs of layers, of one model or of two models that see the same images.

    A layer's representation of an image is the concatenation of all its patch tokens, taken after the residual connections of
    the block and before the final normalisation. (Prefix tokens and the tokens that enter the first block are excluded; models
    of any width, grid and prefix can be compared.) Two layers are similar if images that are similar in one are similar in the
    other:

        CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),

    where K and L are the inner products of all pairs of images, and HSIC is the unbiased estimator, averaged over batches
    weighted by their number of images before the division. CKA is 1 if the representations differ only by a rotation and a
    factor. Which images share a batch affects the estimate, but not what it estimates; more and larger batches make it more
    precise. Batches of fewer than 4 images, as the last one may be, are ignored (see `num_left_out`).

    Args:
        model: Any Vision Transformer whose attention goes through `scaled_dot_product_attention`.
        images: Photographs, paths, a preprocessed tensor (batch, channel, height, width), or an iterable of such batches. With
            two models they are iterated over twice.
        other: The other model; if None, layers of `model` are compared with each other.
        grid: Where the patches of `model` lie; determined from the model if None.
        other_grid: The same for `other`.
        preprocessing: How photographs are prepared for both models; if None, for each model in its own way.
        batch_size: Images per forward pass, at least 4.
        device: Where to run: `auto`, `cpu`, `cuda`, `mps`.

    Raises:
        InputError: If the batches are too small, the images cannot be used, the two models were not shown the same images, the
            blocks of a model cannot be identified, or all images of each batch, or all but one, have the same tokens in some
            layer.

    References:
        Kornblith et al. 2019, arXiv:1905.00414, section 3; in mini-batches: Nguyen et al. 2021, arXiv:2010.15327; the
        estimator: Song et al. 2012, Feature Selection via Dependence Maximization, JMLR 13, equation 5; of Vision
        Transformers: Raghu et al. 2021, arXiv:2108.08810, section 3 and figures 1 and 2.

    Examples:
        >>> import torch
        >>> from vit_probe import VisionTransformer, ViTConfig, representation_similarity
        >>> model = VisionTransformer(ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3))
        >>> result = representation_similarity(model, torch.randn(4, 3, 32, 32))
        >>> result.similarity.shape, result.similarity.diagonal().round(3)
        ((2, 2), array([1., 1.]))
    """
    if batch_size < MIN_IMAGES:
        raise InputError(f"the unbiased estimator needs batches of {MIN_IMAGES} images or more, got batch_size={batch_size}")
    if other is not None and isinstance(images, Iterator):
        raise InputError(
            f"two models go through the images one after the other, but a {type(images).__name__} yields them only once; pass "
            "a list, a tensor, a folder or a dataset"
        )
    models = [(model, grid)] if other is None else [(model, grid), (other, other_grid)]
    runs = [
        AttentionRun(model, images, grid=grid, preprocessing=preprocessing, batch_size=batch_size, device=device)
        for model, grid in models
    ]
    measures = [RepresentationSimilarity(run.layers, keep=other is not None) for run in runs]
    for run, measure in zip(runs, measures, strict=True):
        run.observe(measure)
    provenance = runs[0].provenance(measures[0].options)
    if other is None:
        return measures[0].compute(provenance)
    check_same_images(*runs)
    return measures[0].compute(provenance | {"other": runs[1].provenance(measures[1].options)}, other=measures[1])


def check_same_images(run: AttentionRun, other: AttentionRun) -> None:
    """Check that two runs have gone through the same images in the same order.

    Raises:
        InputError: If they have not.

    Examples:
        >>> import torch
        >>> from vit_probe import load_model
        >>> model, images = load_model("demo"), torch.zeros(1, 3, 64, 64)
        >>> runs = [AttentionRun(model, images), AttentionRun(model, images)]
        >>> for run in runs:
        ...     run.observe(RepresentationSimilarity(run.layers))
        >>> check_same_images(*runs)
    """
    if run.images.provenance()["sha256"] != other.images.provenance()["sha256"]:
        raise InputError(
            f"the two models were shown {len(run.images.names)} and {len(other.images.names)} images, not the same in the same "
            "order; pass images that are the same on every pass, such as files, or a DataLoader that does not shuffle"
        )


class RepresentationSimilarity(HiddenStateMeasure):
    """The streaming measure behind `representation_similarity`.

    It keeps sums over batches for all pairs of layers. For a comparison with another model, it also keeps the centred products
    of all pairs of images in each batch: for each image 4 bytes times layers times images per batch.

    Args:
        modules: Path of each layer's module, as `AttentionRun.layers` lists them.
        keep: Whether to keep the centred products that a comparison with another model needs.

    Examples:
        >>> import torch
        >>> measure = RepresentationSimilarity(["blocks.0.attn", "blocks.1.attn"])
        >>> tokens = torch.randn(5, 16, 24)  # image, patch, dim
        >>> measure.begin_batch()
        >>> measure.update_tokens(0, tokens)
        >>> measure.update_tokens(1, 2 * tokens)
        >>> measure.end_batch()
        >>> measure.compute().similarity.round(3)
        array([[1., 1.],
               [1., 1.]])
    """

    name = "representation_similarity"
    display_name = "representation similarities"
    min_batch_size = MIN_IMAGES

    def __init__(self, modules: Sequence[str], *, keep: bool = False) -> None:
        super().__init__(modules)
        self.keep = keep
        self._sums = np.zeros((len(self.modules), len(self.modules)))
        self._sizes: list[int] = []  # images in each batch
        self._left_out = 0
        self._kept: list[Float[np.ndarray, "layer pair"]] = []

    @property
    def options(self) -> dict[str, Any]:
        return {"keep": self.keep}

    def state(self) -> dict[str, Any]:
        """What `restore` needs to continue from here: arrays and JSON-serialisable values."""
        kept = {"kept": np.concatenate(self._kept, axis=1)} if self._kept else {}
        return {"sums": self._sums.copy(), "sizes": list(self._sizes), "left_out": self._left_out} | kept

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to a `state` of a measure of the same model with the same options."""
        self._sums, self._sizes, self._left_out = state["sums"].copy(), list(state["sizes"]), state["left_out"]
        ends = np.cumsum([size * (size - 1) // 2 for size in self._sizes])
        self._kept = np.split(state["kept"], ends[:-1], axis=1) if "kept" in state else []

    def merge(self, other: Self) -> None:
        """Append the batches of `other`. Either may be empty.

        Raises:
            InputError: If `other` has different layers or a different `keep`.
        """
        self._check_alike(other)
        self._sums = self._sums + other._sums
        self._sizes = self._sizes + other._sizes
        self._left_out += other._left_out
        self._kept = self._kept + other._kept

    def compute(
        self,
        provenance: dict[str, Any] | None = None,
        *,
        names: list[str] | None = None,
        images: np.ndarray | None = None,
        other: RepresentationSimilarity | None = None,
    ) -> RepresentationSimilarityResult:
        """The result over all images so far, within this model, or between it and the model of `other`.

        Raises:
            InputError: If there were too few images, `other` has seen batches of other sizes, either measure has not kept them,
                or all images of each batch, or all but one, have the same tokens in some layer.
        """
        second = self if other is None else other
        sums = self._sums if other is None else self._cross_hsic(other)
        norms = [np.sqrt(measure._own_hsic()) for measure in (self, second)]
        return RepresentationSimilarityResult(
            similarity=sums / np.outer(*norms),
            modules=list(self.modules),
            other_modules=list(second.modules),
            num_images=sum(self._sizes),
            num_batches=len(self._sizes),
            num_left_out=self._left_out,
            provenance=provenance or {},
        )

    def _own_hsic(self) -> Float[np.ndarray, "layer"]:
        """HSIC of each layer with itself, times the number of images."""
        if not self._sizes:
            reason = f"; {self._left_out} images came in smaller ones; pass more per batch" if self._left_out else ""
            raise InputError(f"no batch of {MIN_IMAGES} images or more has been measured yet{reason}")
        own = self._sums.diagonal()
        if constant := np.flatnonzero(own <= 0).tolist():
            layer = f"{constant[0]} ({self.modules[constant[0]]})"
            raise InputError(
                f"all images of each batch, or all but one, have the same tokens in layer {layer}; there is no variation to "
                "compare; pass images that differ"
            )
        return own

    def _cross_hsic(self, other: RepresentationSimilarity) -> Float[np.ndarray, "layer other_layer"]:
        """HSIC of each layer with each layer of `other`, times the number of images."""
        if not (self.keep and other.keep):
            raise InputError("batches must be kept to be compared with those of another model; measure both with keep=True")
        if self._sizes != other._sizes:
            raise InputError(
                f"the two models have seen batches of {_format_sizes(self._sizes)} and {_format_sizes(other._sizes)} images; "
                "show both the same images, in batches that fit in memory"
            )
        sums = np.zeros((len(self.modules), len(other.modules)))
        for mine, theirs in zip(self._kept, other._kept, strict=True):
            sums += mine @ theirs.T
        return sums

    def _reduced(self, tokens: Float[Tensor, "image patch dim"]) -> np.ndarray:
        products = inner_products(tokens)
        check_finite(products, f"tokens of layer {len(self._batch)} ({self.modules[len(self._batch)]})")
        return products

    def _add(self, batch: list[np.ndarray], images: int) -> None:
        if images < MIN_IMAGES:
            self._left_out += images
            return
        vectors = np.stack([centred_pairs(products) for products in batch])
        self._sums = self._sums + vectors @ vectors.T
        self._sizes = [*self._sizes, images]
        if self.keep:
            self._kept = [*self._kept, vectors]


def _format_sizes(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes[:5])) + (", ..." if len(sizes) > 5 else "")
