"""Norms of the patch tokens in each layer, and the artifacts: tokens with outlying norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vit_probe.errors import InputError
from vit_probe.measures.artifacts import find_artifacts
from vit_probe.measures.base.hidden_states import HiddenStateMeasure
from vit_probe.measures.base.registry import streaming_measure
from vit_probe.results import KeyNumber, Result, check_finite
from vit_probe.runner.run import AttentionRun
from vit_probe.tokens.grid import TokenGrid

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
        typical_norm: (layer), geometric mean of the norms of all other tokens.
        artifact_norm: (layer), geometric mean of the norms of artifacts; NaN in layers without artifacts.
        artifact_neighbours: (layer), how many of the four tokens above, below, left and right of an artifact are artifacts, on
            average; NaN in layers without artifacts.
        valley_depth: (layer), depth of the deepest valley of the counts beyond which tokens are scattered, in standard
            deviations; 0 if there is none. Artifacts need more than 3.5.
        modules: Path of each layer's module.
        num_images: Number of images.
    """

    measure: str = "token_norms"
    counts: Int[np.ndarray, "layer bin"]
    edges: Float[np.ndarray, "bin+1"]
    threshold: Float[np.ndarray, "layer"]
    artifacts: Float[np.ndarray, "layer"]
    artifact_images: Float[np.ndarray, "layer"]
    typical_norm: Float[np.ndarray, "layer"]
    artifact_norm: Float[np.ndarray, "layer"]
    artifact_neighbours: Float[np.ndarray, "layer"]
    valley_depth: Float[np.ndarray, "layer"]
    modules: Annotated[list[str], "layer"]
    num_images: int

    def __post_init__(self) -> None:
        """Raise InputError if an edge of the bins is NaN or infinite."""
        super().__post_init__()
        check_finite(self.edges, "edges of the bins")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer: layer, module, tokens (their number), lowest, median, highest (norms, to 0.5 %), threshold,
        artifacts, artifact_images, typical_norm, artifact_norm, artifact_neighbours, valley_depth, num_images.
        """
        columns: dict[str, Any] = {
            "layer": np.arange(len(self.modules)),
            "module": self.modules,
            "tokens": self.counts.sum(axis=1),
            "lowest": self._quantile(0.0),
            "median": self._quantile(0.5),
            "highest": self._quantile(1.0),
        }
        fields = ("threshold", "artifacts", "artifact_images", "typical_norm", "artifact_norm", "artifact_neighbours")
        return pd.DataFrame(columns | {name: getattr(self, name) for name in (*fields, "valley_depth", "num_images")})

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
    comes from the data: it lies in a valley of the layer's distribution of norms. A layer has artifacts if all of these hold:

    - There is a valley. On both sides of it, some window of norms holds more tokens than a window of the same width (at least
      1/8 octave) in the valley, by more than 3.5 standard deviations of independent counts. So it takes at least 13 artifacts.
    - The tokens above the threshold are scattered, not an object: of the four tokens next to each of them, fewer than one is
      above the threshold, on average. In the paper, artifacts are single patches of a uniform background.
    - There are such tokens in more than a quarter of the images.

    What this finds depends on the share of artifacts, on the ratio of their norms to those of other tokens, and on the spread
    of the latter (standard deviation of the natural logarithm; 0.08 to 0.2 in the layers of DINOv2 ViT-S/14). In simulated
    log-normal norms of 32 images of 16 x 16 tokens, artifacts are found in at least 9 of 10 samples from these ratios on, for
    shares of 0.5, 1, 2 and 5 % (of the ratios 1.6, 1.8, 2, 2.5, 3, 4):

    - at a spread of 0.1: 2, 2, 1.8, 1.6;
    - at a spread of 0.15: 3, 2.5, 2.5, 2;
    - at a spread of 0.2: 4, 4, 3, 2.5.

    Below, they are soon never found. Multiplying the norms of randomly chosen tokens of DINOv2 ViT-S/14 (32 photographs, five
    samples in each of the 12 layers), 3 % at 1.6 times the norm are found in 17 of 60 cases, 1.35 % at 2 times in 41, and 2 %
    at about 2.5 times in 58. No artifacts are found in 40 samples each of a smooth foreground of 3, 10 or 35 % of the tokens at
    1.8 or 3 times the norm, and of norms that are skewed, heavy-tailed or uniform. Artifacts that make up more than a quarter
    of the tokens, or fill areas, are not found; objects of one or two tokens in most images count as artifacts.

    Tokens are taken after a block's residual connections and before the final normalisation, without prefix tokens; the tokens
    that enter the first block are not measured. Norms are counted in bins of 1/128 octave (0.54 %) from 2^-16 to 2^20, so the
    result does not depend on how images are split into batches. Norms outside this range, such as 0, are counted in the first
    or last bin; the first bin is then left out of the means.

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
    return TokenNorms(run.layers, [run.layout.grid_of(layer) for layer in range(len(run.layers))])


class TokenNorms(HiddenStateMeasure):
    """The streaming measure behind `token_norms`; it keeps 13,824 counts per layer, regardless of the number of images.

    Args:
        modules: Path of each layer's module, as `AttentionRun.layers` lists them.
        grids: Where the patches of each layer lie.

    Examples:
        >>> import torch
        >>> from vit_probe import TokenGrid
        >>> grid = TokenGrid(4, 4, (16, 16), num_prefix_tokens=1, has_cls_token=True)
        >>> measure = TokenNorms(["blocks.0.attn"], [grid])
        >>> measure.begin_batch()
        >>> measure.update_tokens(0, torch.ones(1, 16, 25))  # image, patch, dim
        >>> measure.end_batch()
        >>> measure.compute().typical_norm.round(1)
        array([5.])
    """

    name = "token_norms"
    display_name = "token norms"

    def __init__(self, modules: Sequence[str], grids: Sequence[TokenGrid]) -> None:
        super().__init__(modules)
        self._grids = list(grids)
        # In each bin the number of tokens, of images whose largest norm it is, and of adjacent tokens whose smaller norm it is.
        # The last tells, for any threshold, how many pairs of adjacent tokens lie above it.
        self._counts = np.zeros((3, len(self.modules), (_MAX_OCTAVE - _MIN_OCTAVE) * _BINS_PER_OCTAVE), dtype=np.int64)
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
        counts = self._counts[:, :, occupied[0] : occupied[-1] + 1]
        octaves = _MIN_OCTAVE + np.arange(occupied[0], occupied[-1] + 2) / _BINS_PER_OCTAVE
        log_edges = octaves * np.log(2)
        layers = [
            find_artifacts(tokens, image_maxima, pair_minima, log_edges, open_below=occupied[0] == 0)
            for tokens, image_maxima, pair_minima in counts.swapaxes(0, 1)
        ]
        artifacts: dict[str, Any] = {name: np.array([layer[name] for layer in layers]) for name in layers[0]}
        return TokenNormsResult(
            counts=counts[0],
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
        counts = [
            torch.bincount(index, minlength=bins)
            for index in (bin_index.flatten(), bin_index.amax(dim=1), _pair_minima(bin_index, self._grids[len(self._batch)]))
        ]
        return torch.stack(counts).cpu().numpy()

    def _add(self, batch: list[np.ndarray], images: int) -> None:
        self._counts = self._counts + np.stack(batch, axis=1)
        self._num_images += images


def _pair_minima(values: Int[Tensor, "image patch"], grid: TokenGrid) -> Int[Tensor, "pair"]:
    """The smaller of the values of each two patches that are side by side or one above the other."""
    on_grid = values.unflatten(1, (grid.rows, grid.cols))
    vertical = torch.minimum(on_grid[:, 1:], on_grid[:, :-1])
    horizontal = torch.minimum(on_grid[:, :, 1:], on_grid[:, :, :-1])
    return torch.cat([vertical.flatten(), horizontal.flatten()])
