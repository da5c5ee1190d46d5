"""Norms of the patch tokens in each layer, and the artifacts: tokens with outlying norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from vit_probe.errors import InputError
from vit_probe.measures.base.hidden_states import HiddenStateMeasure
from vit_probe.measures.base.registry import streaming_measure
from vit_probe.measures.gaussian_mixture import find_artifacts
from vit_probe.results import KeyNumber, Result, check_finite
from vit_probe.runner.run import AttentionRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["TokenNorms", "TokenNormsResult", "token_norms"]

_BINS_PER_OCTAVE = 128  # each bin is 0.54 % wide
_MIN_OCTAVE, _MAX_OCTAVE = -16, 20  # powers of 2


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TokenNormsResult(Result):
    """Distribution of the norms of patch tokens in each layer, and the artifacts among them.

    Args:
        counts: (layer, bin), number of tokens of all images; the bins are 1/128 octave wide and reach from the smallest norm to
            the largest.
        edges: (bin + 1), norms at the edges of the bins.
        threshold: (layer), the norm above which a token is an artifact, at a bin's edge; NaN in layers without artifacts.
        artifacts: (layer), the fraction of tokens that are artifacts.
        artifact_images: (layer), the fraction of images with at least one artifact.
        typical_norm: (layer), geometric mean of the norms; in layers with artifacts, that of the lower component.
        artifact_norm: (layer), geometric mean of the upper component; NaN in layers without artifacts.
        separation: (layer), Ashman's D of the two fitted components, whether or not they are artifacts; NaN if all norms are in
            one bin.
        bic_gain: (layer), by how much a second component lowers the Bayesian information criterion; NaN if all norms are in
            one bin.
        modules: Path of each layer's module.
        num_images: Number of images.
    """

    measure: str = "token_norms"
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
        """One row per layer: layer, module, tokens (their number), lowest, median, highest (norms, to 0.5 %), threshold,
        artifacts, artifact_images, typical_norm, artifact_norm, separation, bic_gain, num_images.
        """
        columns: dict[str, Any] = {
            "layer": np.arange(len(self.modules)),
            "module": self.modules,
            "tokens": self.counts.sum(axis=1),
            "lowest": self._quantile(0.0),
            "median": self._quantile(0.5),
            "highest": self._quantile(1.0),
        }
        fields = ("threshold", "artifacts", "artifact_images", "typical_norm", "artifact_norm", "separation", "bic_gain")
        return pd.DataFrame(columns | {name: getattr(self, name) for name in (*fields, "num_images")})

    def histogram(self, bins_per_octave: int | None = None) -> pd.DataFrame:
        """One row per layer and bin, including empty bins: layer, module, norm_from, norm_to, tokens (their number), part (the
        fraction of the layer's tokens).

        Args:
            bins_per_octave: A divisor of 128; if None, the largest of 32, 16, 8 that gives at most 64 bins in all, else 4.

        Raises:
            InputError: If `bins_per_octave` is not a divisor of 128.
        """
        if bins_per_octave is None:
            octaves = self.counts.shape[1] / _BINS_PER_OCTAVE
            bins_per_octave = next((candidate for candidate in (32, 16, 8) if octaves * candidate <= 64), 4)
        if bins_per_octave < 1 or _BINS_PER_OCTAVE % bins_per_octave:
            raise InputError(f"bins_per_octave must divide {_BINS_PER_OCTAVE}, got {bins_per_octave}")
        width = _BINS_PER_OCTAVE // bins_per_octave
        first_bin = round(float(np.log2(self.edges[0])) * _BINS_PER_OCTAVE)
        # Pad with empty bins, so that the edges of wide bins lie at the same norms in every result.
        before = first_bin % width
        padded = np.pad(self.counts, ((0, 0), (before, -(before + self.counts.shape[1]) % width)))
        counts = padded.reshape(len(padded), -1, width).sum(axis=2)
        start = (first_bin - before) // width
        edges = 2.0 ** (np.arange(start, start + counts.shape[1] + 1) / bins_per_octave)
        layer, bin_index = (index.ravel() for index in np.indices(counts.shape))
        columns = {
            "layer": layer,
            "module": [self.modules[index] for index in layer],
            "norm_from": edges[bin_index],
            "norm_to": edges[bin_index + 1],
            "tokens": counts.ravel(),
            "part": (counts / counts.sum(axis=1, keepdims=True)).ravel(),
        }
        return pd.DataFrame(columns)

    def summary(self) -> pd.DataFrame:
        """One row per layer: median and highest norm, percentage of artifacts, threshold, and norm of artifacts."""
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

    def key_numbers(self) -> list[KeyNumber]:
        """Median norm after the first and the last layer, and the fraction of artifacts after the last."""
        table = self.to_dataframe()
        first, last = table.iloc[0], table.iloc[-1]
        return [
            ("after the first layer", "norm", float(first["median"])),
            ("after the last layer", "norm", float(last["median"])),
            ("artifacts", "share", float(last["artifacts"])),
        ]

    @property
    def panel_title(self) -> str:
        """Title of the result's panel in the overview."""
        return "Token norms\n(median and range)"

    def plot_panel(self, *, ax: Axes) -> Axes:
        """Draw the median and the range of the norms in each layer."""
        from vit_probe.plots.comparison import plot_range

        return plot_range(self.to_dataframe(), ax=ax)

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Draw the distribution of the norms in each layer, with the thresholds."""
        from vit_probe.plots.token_norms import plot_token_norms

        return plot_token_norms(self.histogram(), self.to_dataframe(), ax=ax)

    def _quantile(self, fraction: float) -> Float[np.ndarray, "layer"]:
        """The norm below which this fraction of each layer's tokens lies: the (geometric) centre of its bin."""
        cumulative = self.counts.cumsum(axis=1) / self.counts.sum(axis=1, keepdims=True)
        bins = ((cumulative >= fraction) & (cumulative > 0)).argmax(axis=1)
        return np.sqrt(self.edges[:-1] * self.edges[1:])[bins]


@streaming_measure(result=TokenNormsResult)
def token_norms(run: AttentionRun) -> TokenNorms:
    """Euclidean norms of the patch tokens after each block, and the fraction of tokens that are artifacts.

    Large models that were trained for long use a few low-information patches to store other information; the norms of these
    tokens lie far above all others. The paper cuts at a norm chosen by eye (150, for one model's output). Here the threshold
    comes from the data: two Gaussians are fitted to the logarithms of a layer's norms, and a token is an artifact if its norm
    is above the point at which both components are equally probable. A layer has artifacts only if all of these hold: two
    components have a lower Bayesian information criterion (BIC) than one; their separation is clean (Ashman's D > 2); the upper
    component has fewer tokens than the lower; there is a valley between two peaks, both in the fitted density and in the
    counts, which are smaller in the valley than at the densest place on either side by more than 3.5 standard deviations; and
    more than half of the images contain such a token, so that the uniform background of a single photograph does not count.
    Consequently, fewer than 15 (of nearly equal norms) to 40 artifact tokens among all images cannot be told from chance, and
    artifacts of three kinds or of very different norms, which no single Gaussian fits, may be missed.

    BIC treats tokens as independent, although the tokens of an image resemble each other; with thousands of tokens it always
    prefers two components to one skewed one, so the other conditions decide. Tokens are taken after a block's residual
    connections and before the final normalisation, without prefix tokens; the tokens that enter the first block are not
    measured. Norms are counted in bins of 1/128 octave (0.54 %) from 2^-16 to 2^20, so the result does not depend on how images
    are split into batches. Norms outside this range, such as 0, are counted in the first or last bin; the first bin is then
    left out of the fit.

    Raises:
        InputError: If the images cannot be used, the blocks of the model cannot be identified, or norms are not finite.

    References:
        Darcet et al. 2024, Vision Transformers Need Registers, arXiv:2309.16588, section 2.1, figures 3 and 4.

    Examples:
        >>> import torch
        >>> from vit_probe import load_model, token_norms
        >>> len(token_norms(load_model("demo"), torch.zeros(1, 3, 64, 64)).to_dataframe())
        9
    """
    return TokenNorms(run.layers)


class TokenNorms(HiddenStateMeasure):
    """The streaming measure behind `token_norms`; it keeps 9,216 counts per layer, regardless of the number of images.

    Args:
        modules: Path of each layer's module, as `AttentionRun.layers` lists them.

    Examples:
        >>> import torch
        >>> measure = TokenNorms(["blocks.0.attn"])
        >>> measure.begin_batch()
        >>> measure.update_tokens(0, torch.ones(1, 16, 25))  # image, patch, dim
        >>> measure.end_batch()
        >>> measure.compute().typical_norm.round(1)
        array([5.])
    """

    name = "token_norms"
    display_name = "token norms"

    def __init__(self, modules: Sequence[str]) -> None:
        super().__init__(modules)
        # First the number of tokens in each bin, then the number of images whose largest norm is in it.
        self._counts = np.zeros((2, len(self.modules), (_MAX_OCTAVE - _MIN_OCTAVE) * _BINS_PER_OCTAVE), dtype=np.int64)
        self._num_images = 0

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def state(self) -> dict[str, Any]:
        """What `restore` needs to continue from here: arrays and JSON-serialisable values."""
        return {"counts": self._counts.copy(), "images": self._num_images}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to a `state` of a measure of the same model."""
        self._counts, self._num_images = state["counts"].copy(), state["images"]

    def merge(self, other: Self) -> None:
        """Add the counts of `other`. Either may be empty.

        Raises:
            InputError: If `other` has different layers.
        """
        self._check_alike(other)
        self._counts = self._counts + other._counts
        self._num_images += other._num_images

    def compute(
        self, provenance: dict[str, Any] | None = None, *, names: list[str] | None = None, images: np.ndarray | None = None
    ) -> TokenNormsResult:
        """The result over all images so far.

        Raises:
            InputError: If there were none.
        """
        if not self._num_images:
            raise InputError("no token norms have been measured yet")
        occupied = np.flatnonzero(self._counts[0].sum(axis=0))
        token_counts, image_counts = self._counts[:, :, occupied[0] : occupied[-1] + 1]
        octaves = _MIN_OCTAVE + np.arange(occupied[0], occupied[-1] + 2) / _BINS_PER_OCTAVE
        log_edges = octaves * np.log(2)
        layers = [
            find_artifacts(*counts, log_edges, open_below=occupied[0] == 0)
            for counts in zip(token_counts, image_counts, strict=True)
        ]
        artifacts: dict[str, Any] = {name: np.array([layer[name] for layer in layers]) for name in layers[0]}
        return TokenNormsResult(
            counts=token_counts,
            edges=2.0**octaves,
            modules=list(self.modules),
            num_images=self._num_images,
            provenance=provenance or {},
            **artifacts,
        )

    def _reduced(self, tokens: Float[Tensor, "image patch dim"]) -> np.ndarray:
        dtype = tokens.dtype if tokens.dtype == torch.float64 else torch.float32
        norms = torch.linalg.vector_norm(tokens, dim=-1, dtype=dtype)
        check_finite(norms.amax().cpu().numpy(), self.display_name)
        bins = self._counts.shape[2]
        bin_index = ((norms.log2() - _MIN_OCTAVE) * _BINS_PER_OCTAVE).floor().clamp(0, bins - 1).long()
        counts = [torch.bincount(index, minlength=bins) for index in (bin_index.flatten(), bin_index.amax(dim=1))]
        return torch.stack(counts).cpu().numpy()

    def _add(self, batch: list[np.ndarray], images: int) -> None:
        self._counts = self._counts + np.stack(batch, axis=1)
        self._num_images += images
