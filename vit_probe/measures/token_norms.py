"""Norms of the patch tokens, layer by layer, and the tokens whose norm is of another kind: artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vit_probe.data.preprocessing import Preprocessing
from vit_probe.data.stream import Images
from vit_probe.errors import InputError
from vit_probe.measures.base.hidden_states import HiddenStateMeasure
from vit_probe.measures.gaussian_mixture import find_artifacts
from vit_probe.results import Result, check_finite
from vit_probe.runner.run import AttentionRun
from vit_probe.tokens.grid import TokenGrid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["TokenNorms", "TokenNormsResult", "token_norms"]

_FINE = 128  # bins an octave: 0.54 % wide
_LOWEST, _HIGHEST = -16, 20  # octaves


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TokenNormsResult(Result):
    """How the norms of patch tokens are distributed in every layer, and which of them are artifacts.

    Args:
        counts: (layer, bin), tokens of all images; the bins are 1/128 octave wide, from the least norm to the greatest.
        edges: (bin + 1), norms between which the bins lie.
        threshold: (layer), the norm above which a token is an artifact, at a bin's edge; NaN where there are none.
        artifacts: (layer), the part of the tokens that are; 0 where there are none.
        artifact_images: (layer), the part of the images that have one or more.
        typical_norm: (layer), geometric mean of the norms; where there are artifacts, of the lower component.
        artifact_norm: (layer), geometric mean of the upper component; NaN where there are no artifacts.
        separation: (layer), Ashman's D of the two components, warranted or not; NaN where all norms are in one bin.
        bic_gain: (layer), by how much two components lower the Bayesian information criterion; NaN as there.
        modules: Path of each layer's module.
        num_images: Images whose tokens these are.
    """

    counts: np.ndarray
    edges: np.ndarray
    threshold: np.ndarray
    artifacts: np.ndarray
    artifact_images: np.ndarray
    typical_norm: np.ndarray
    artifact_norm: np.ndarray
    separation: np.ndarray
    bic_gain: np.ndarray
    modules: list[str]
    num_images: int

    def to_dataframe(self) -> pd.DataFrame:
        """One row a layer: layer, module, tokens (how many), lowest, median, highest (norms, to 0.5 %), threshold, artifacts,
        artifact_images, typical_norm, artifact_norm, separation, bic_gain, num_images.
        """
        columns: dict[str, Any] = {
            "layer": np.arange(len(self.modules)),
            "module": self.modules,
            "tokens": self.counts.sum(axis=1),
            "lowest": self._quantile(0.0),
            "median": self._quantile(0.5),
            "highest": self._quantile(1.0),
        }
        found = ("threshold", "artifacts", "artifact_images", "typical_norm", "artifact_norm", "separation", "bic_gain")
        return pd.DataFrame(columns | {name: getattr(self, name) for name in (*found, "num_images")})

    def histogram(self, bins_per_octave: int | None = None) -> pd.DataFrame:
        """One row a layer and bin, empty ones included: layer, module, norm_from, norm_to, tokens, part (of the layer's).

        Args:
            bins_per_octave: A divisor of 128; if None, as many as make at most 64 bins in all, 4 at least.

        Raises:
            InputError: If it is none.
        """
        if bins_per_octave is None:
            bins_per_octave = next((fine for fine in (32, 16, 8) if self.counts.shape[1] * fine <= 64 * _FINE), 4)
        if bins_per_octave < 1 or _FINE % bins_per_octave:
            raise InputError(f"bins_per_octave must divide {_FINE}, got {bins_per_octave}")
        width = _FINE // bins_per_octave
        first = round(float(np.log2(self.edges[0])) * _FINE) % width  # fine bins of the first coarse one that are not there
        padded = np.pad(self.counts, ((0, 0), (first, -(first + self.counts.shape[1]) % width)))
        counts = padded.reshape(len(padded), -1, width).sum(axis=2)
        start = round(float(np.log2(self.edges[0])) * _FINE - first) // width
        edges = 2.0 ** (np.arange(start, start + counts.shape[1] + 1) / bins_per_octave)
        layer, place = (index.ravel() for index in np.indices(counts.shape))
        columns = {
            "layer": layer,
            "module": [self.modules[index] for index in layer],
            "norm_from": edges[place],
            "norm_to": edges[place + 1],
            "tokens": counts.ravel(),
            "part": (counts / counts.sum(axis=1, keepdims=True)).ravel(),
        }
        return pd.DataFrame(columns)

    def summary(self) -> pd.DataFrame:
        """One row a layer: median and highest norm, the part of artifacts and their norm."""
        frame = self.to_dataframe()
        columns = {
            "layer": frame["layer"],
            "median norm": frame["median"],
            "highest norm": frame["highest"],
            "artifacts (%)": 100 * frame["artifacts"],
            "threshold": frame["threshold"],
            "artifacts' norm": frame["artifact_norm"],
        }
        return pd.DataFrame(columns)

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """How the norms are distributed in every layer, with the thresholds."""
        from vit_probe.plots.token_norms import plot_token_norms

        return plot_token_norms(self.histogram(), self.to_dataframe(), ax=ax)

    def _quantile(self, part: float) -> Float[np.ndarray, "layer"]:
        """The norm below which this part of each layer's tokens lies: the middle of the bin."""
        reached = self.counts.cumsum(axis=1) / self.counts.sum(axis=1, keepdims=True)
        places = ((reached >= part) & (reached > 0)).argmax(axis=1)
        return np.sqrt(self.edges[:-1] * self.edges[1:])[places]


def token_norms(
    model: nn.Module,
    images: Images,
    *,
    grid: TokenGrid | None = None,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> TokenNormsResult:
    """The Euclidean norms of the patch tokens that each block passes on, and the part of them that are artifacts.

    Large models that were trained for long use a few patches of little content to keep something else in; their tokens have
    norms far above the others'. The paper cuts at a norm chosen by eye (150, for one model's output). Here nothing is chosen:
    two Gaussians are fitted to the logarithms of a layer's norms, and a token is an artifact if it is above the norm at which
    either component is as probable as the other. There are artifacts at all if two components are warranted: if their
    Bayesian information criterion is lower than that of one, their separation is clean (Ashman's D > 2), the upper component
    has the fewer tokens, and there is a valley between two peaks: in the fitted density, and in the tokens themselves, of which
    fewer lie in the valley than where they are densest on either side, by more than 3.5 standard deviations; and if most of the
    images have one, so that the even ground of a single photograph is none. Else the layer has no artifacts: so fewer than
    15 (of nearly one norm) to 40 artifact tokens among all images are not told from chance, and artifacts of three kinds or of
    very different norms, which no single Gaussian fits, may be missed.

    The criterion counts tokens as independent, though those of an image resemble each other; with thousands of tokens it always
    prefers two components to a skewed one, so that the other conditions decide. The tokens are those after a block's residual
    connections, before the final normalisation; prefix tokens, and what enters the first block, are left out. Norms are counted
    in bins of 1/128 octave (0.54 %) from 2^-16 to 2^20, so that any split of the images gives the same; what lies outside, a
    norm of 0 for one, is counted in the first or the last bin, and the first is then left out of the fit.

    Args:
        model: Any Vision Transformer whose attention goes through `scaled_dot_product_attention`.
        images: Photographs, paths, a preprocessed tensor (batch, channel, height, width), or an iterable of such batches.
        grid: Where the patches lie; read from the model if None.
        preprocessing: How photographs are prepared; the model's own if None.
        batch_size: Images a forward pass.
        device: Where to run: `auto`, `cpu`, `cuda`, `mps`.

    Raises:
        InputError: If the images cannot be used, the blocks of the model cannot be told apart, or norms are not finite.

    References:
        Darcet et al. 2024, Vision Transformers Need Registers, arXiv:2309.16588, section 2.1, figures 3 and 4.
    """
    run = AttentionRun(model, images, grid=grid, preprocessing=preprocessing, batch_size=batch_size, device=device)
    measure = TokenNorms(run.layers)
    run.observe(measure)
    return measure.compute(run.provenance(measure.options))


class TokenNorms(HiddenStateMeasure):
    """The streaming measure behind `token_norms`; it keeps 9,216 counts a layer, however many images there are.

    Args:
        modules: Path of each layer's module, as `AttentionRun.layers` lists them.
    """

    display_name = "token norms"

    def __init__(self, modules: Sequence[str]) -> None:
        super().__init__(modules)
        # Of tokens, and of images by their largest token.
        self._counts = np.zeros((2, len(self.modules), (_HIGHEST - _LOWEST) * _FINE), dtype=np.int64)
        self._num_images = 0

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here: arrays, and what JSON can hold."""
        return {"counts": self._counts.copy(), "images": self._num_images}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to where `state` was taken, of a measure of the same model."""
        self._counts, self._num_images = state["counts"].copy(), state["images"]

    def merge(self, other: Self) -> None:
        """Adds what `other` has seen. Either may have seen nothing.

        Raises:
            InputError: If `other` is of other layers.
        """
        self._check_alike(other)
        self._counts = self._counts + other._counts
        self._num_images += other._num_images

    def compute(self, provenance: dict[str, Any] | None = None) -> TokenNormsResult:
        """The result over all images so far.

        Raises:
            InputError: If there were none.
        """
        if not self._num_images:
            raise InputError("no token norms have been measured yet")
        occupied = np.flatnonzero(self._counts[0].sum(axis=0))
        counts, images = self._counts[:, :, occupied[0] : occupied[-1] + 1]
        octaves = _LOWEST + np.arange(occupied[0], occupied[-1] + 2) / _FINE
        edges = 2.0**octaves
        find = partial(find_artifacts, edges=octaves * np.log(2), open_below=occupied[0] == 0)
        layers = [find(*layer) for layer in zip(counts, images, strict=True)]
        return TokenNormsResult(
            counts=counts,
            edges=edges,
            modules=list(self.modules),
            num_images=self._num_images,
            provenance=provenance or {},
            **{name: np.array([layer[name] for layer in layers]) for name in layers[0]},
        )

    def _reduced(self, tokens: Float[Tensor, "image patch dim"]) -> np.ndarray:
        dtype = tokens.dtype if tokens.dtype == torch.float64 else torch.float32
        norms = torch.linalg.vector_norm(tokens, dim=-1, dtype=dtype)
        check_finite(norms.amax().cpu().numpy(), self.display_name)
        bins = self._counts.shape[2]
        place = ((norms.log2() - _LOWEST) * _FINE).floor().clamp(0, bins - 1).long()
        return torch.stack([torch.bincount(of, minlength=bins) for of in (place.flatten(), place.amax(dim=1))]).cpu().numpy()

    def _add(self, batch: list[np.ndarray], images: int) -> None:
        self._counts = self._counts + np.stack(batch, axis=1)
        self._num_images += images
