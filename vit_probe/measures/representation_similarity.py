"""How alike the representations of layers are, within a model and between two: centred kernel alignment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor, nn

from vit_probe.data.preprocessing import Preprocessing
from vit_probe.data.stream import Images
from vit_probe.errors import InputError
from vit_probe.measures.base.hidden_states import HiddenStateMeasure
from vit_probe.measures.hsic import FEWEST, centred_pairs, inner_products
from vit_probe.results import Result, check_finite
from vit_probe.runner.run import AttentionRun
from vit_probe.tokens.grid import TokenGrid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["RepresentationSimilarity", "RepresentationSimilarityResult", "check_same_images", "representation_similarity"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class RepresentationSimilarityResult(Result):
    """Centred kernel alignment (CKA) of all pairs of layers, of a model with itself or with another.

    Args:
        similarity: (layer, other_layer), at most 1; estimates of small similarities may lie a little below 0.
        modules: Path of each layer's module.
        other_modules: The same of the other model; of this one, where there is no other.
        num_images: Images that it is computed of.
        num_batches: Batches that they came in.
        num_left_out: Images in batches of fewer than 4, which count for nothing.
    """

    similarity: Float[np.ndarray, "layer other_layer"]
    modules: list[str]
    other_modules: list[str]
    num_images: int
    num_batches: int
    num_left_out: int

    def to_dataframe(self) -> pd.DataFrame:
        """One row a pair of layers: layer, module, other_layer, other_module, similarity, num_images."""
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
        """One row a layer: which other layer is most like it, and mean and lowest similarity.

        Within one model the layer itself is left out.
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

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Layer against layer, the first ones at the lower left."""
        from vit_probe.plots.representation_similarity import plot_representation_similarity

        return plot_representation_similarity(self.similarity, ax=ax)


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
    """Linear centred kernel alignment (CKA) of all pairs of layers, of one model, or of two that see the same images.

    A layer represents an image by all its patch tokens, one after the other: those that its block passes on, after the residual
    connections, before the final normalisation. (Prefix tokens, and what enters the first block, are left out; so models of
    any width, grid and prefix compare.) Two layers are alike if the same images have similar representations in both:

        CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),

    K and L the inner products of all pairs of images, HSIC the unbiased estimator, averaged over the batches, each
    weighted with its number of images, before it is divided. It is 1 where the representations differ by a rotation and a
    factor. Which images come together in a batch changes the estimate, but not what it estimates; more and larger batches
    make it better. Batches of fewer than 4 images, as the last may be, count for nothing (see `num_left_out`).

    Args:
        model: Any Vision Transformer whose attention goes through `scaled_dot_product_attention`.
        images: Photographs, paths, a preprocessed tensor (batch, channel, height, width), or an iterable of such batches. Two
            models go through them one after the other.
        other: The other model; if None, layers of `model` are compared with each other. Photographs are prepared for each
            model in its own way.
        grid: Where the patches of `model` lie; read from it if None.
        other_grid: The same of `other`.
        preprocessing: How photographs are prepared, for both models; each one's own if None.
        batch_size: Images a forward pass, 4 at least.
        device: Where to run: `auto`, `cpu`, `cuda`, `mps`.

    Raises:
        InputError: If the batches are too small, the images cannot be used, the two models were not shown the same images, the
            blocks of a model cannot be told apart, or the images have the same tokens in some
            layer, or all but one of a batch have.

    References:
        Kornblith et al. 2019, arXiv:1905.00414, section 3; in mini-batches: Nguyen et al. 2021, arXiv:2010.15327; the
        estimator: Song et al. 2012, Feature Selection via Dependence Maximization, JMLR 13, equation 5; of Vision
        Transformers: Raghu et al. 2021, arXiv:2108.08810, section 3 and figures 1 and 2.
    """
    if batch_size < FEWEST:
        raise InputError(f"the unbiased estimator needs batches of {FEWEST} images or more, got batch_size={batch_size}")
    if other is not None and isinstance(images, Iterator):
        raise InputError(
            f"two models go through the images one after the other, but a {type(images).__name__} gives them once; pass "
            "a list, a tensor, a folder or a dataset"
        )
    both = [(model, grid)] if other is None else [(model, grid), (other, other_grid)]
    runs = [
        AttentionRun(one, images, grid=where, preprocessing=preprocessing, batch_size=batch_size, device=device)
        for one, where in both
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
    """Raise InputError unless two runs have gone through the same images in the same order."""
    if run.images.provenance()["sha256"] != other.images.provenance()["sha256"]:
        raise InputError(
            f"the two models were shown {len(run.images.names)} and {len(other.images.names)} images, not the same in the same "
            "order; pass images that come alike each time, such as files, or a DataLoader that does not shuffle"
        )


class RepresentationSimilarity(HiddenStateMeasure):
    """The streaming measure behind `representation_similarity`.

    It keeps sums over batches for all pairs of layers. To be compared with another model's measure, it also keeps the centred
    products of all pairs of images in each batch: for each image 4 bytes times layers times images in a batch.

    Args:
        modules: Path of each layer's module, as `AttentionRun.layers` lists them.
        keep: Whether to keep what a comparison with another model needs.
    """

    display_name = "representation similarities"
    min_batch_size = FEWEST

    def __init__(self, modules: Sequence[str], *, keep: bool = False) -> None:
        super().__init__(modules)
        self.keep = keep
        self._sums = np.zeros((len(self.modules), len(self.modules)))
        self._sizes: list[int] = []  # of the batches
        self._left_out = 0
        self._kept: list[Float[np.ndarray, "layer pair"]] = []

    @property
    def options(self) -> dict[str, Any]:
        return {"keep": self.keep}

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here: arrays, and what JSON can hold."""
        kept = {"kept": np.concatenate(self._kept, axis=1)} if self._kept else {}
        return {"sums": self._sums.copy(), "sizes": list(self._sizes), "left_out": self._left_out} | kept

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to where `state` was taken, of a measure of the same model with the same options."""
        self._sums, self._sizes, self._left_out = state["sums"].copy(), list(state["sizes"]), state["left_out"]
        pairs = np.cumsum([size * (size - 1) // 2 for size in self._sizes])
        self._kept = np.split(state["kept"], pairs[:-1], axis=1) if "kept" in state else []

    def merge(self, other: Self) -> None:
        """Adds the batches of `other` after those of this measure. Either may have seen nothing.

        Raises:
            InputError: If `other` is of other layers, or does not keep the same.
        """
        self._check_alike(other)
        self._sums = self._sums + other._sums
        self._sizes = self._sizes + other._sizes
        self._left_out += other._left_out
        self._kept = self._kept + other._kept

    def compute(
        self, provenance: dict[str, Any] | None = None, *, other: RepresentationSimilarity | None = None
    ) -> RepresentationSimilarityResult:
        """The result over all images so far, within this model, or between it and the model of `other`.

        Raises:
            InputError: If there were too few images, `other` has seen other batches, one of both has not kept them, or
                the images have the same tokens in some layer, or all but one of a batch have.
        """
        beside = self if other is None else other
        sums = self._sums if other is None else self._between(other)
        lengths = [np.sqrt(measure._lengths()) for measure in (self, beside)]
        return RepresentationSimilarityResult(
            similarity=sums / np.outer(*lengths),
            modules=list(self.modules),
            other_modules=list(beside.modules),
            num_images=sum(self._sizes),
            num_batches=len(self._sizes),
            num_left_out=self._left_out,
            provenance=provenance or {},
        )

    def _lengths(self) -> Float[np.ndarray, "layer"]:
        """HSIC of each layer with itself."""
        if not self._sizes:
            reason = f"; {self._left_out} images came in smaller ones, pass more at a time" if self._left_out else ""
            raise InputError(f"no batch of {FEWEST} images or more has been measured yet{reason}")
        own = self._sums.diagonal()
        if alike := np.flatnonzero(own <= 0).tolist():
            layer = f"{alike[0]} ({self.modules[alike[0]]})"
            raise InputError(
                f"all images of each batch, or all but one, have the same tokens in layer {layer}; there is no similarity "
                "without differences between images"
            )
        return own

    def _between(self, other: RepresentationSimilarity) -> Float[np.ndarray, "layer other_layer"]:
        if not (self.keep and other.keep):
            raise InputError("batches must be kept to be compared with those of another model; measure both with keep=True")
        if self._sizes != other._sizes:
            raise InputError(
                f"the two models have seen batches of {_listed(self._sizes)} and {_listed(other._sizes)} images; show both the "
                "same images, in batches that memory holds"
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
        if images < FEWEST:
            self._left_out += images
            return
        vectors = np.stack([centred_pairs(products) for products in batch])
        self._sums = self._sums + vectors @ vectors.T
        self._sizes = [*self._sizes, images]
        if self.keep:
            self._kept = [*self._kept, vectors]


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes[:5])) + (", ..." if len(sizes) > 5 else "")
