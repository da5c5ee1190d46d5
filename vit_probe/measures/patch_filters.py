"""Filters of a model's first layer: their principal components, the filters themselves, and how smooth they are."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from einops import rearrange
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.fft import dctn
from sklearn.decomposition import PCA
from torch import Tensor, nn

from vit_probe.attention.arguments import check_model
from vit_probe.checkpoints.files import TENSOR_SUFFIXES, read_tensors
from vit_probe.errors import AssumptionWarning, InputError
from vit_probe.measures.base.registry import model_measure
from vit_probe.results import KeyNumber, Result, check_finite, software_versions
from vit_probe.runner.run import model_provenance
from vit_probe.tokens.patch_embedding import find_patch_embedding

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "PatchFiltersResult",
    "convolution_filters",
    "low_frequency_share",
    "patch_filters",
]


_COLOURS = 3
_ROUNDING = 1e-24  # relative to the square of the constant: what the transform of a constant filter leaves at other frequencies


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PatchFiltersResult(Result):
    """Filters of a first layer, or their principal components.

    Args:
        filters: (filter, channel, row, col); principal components have unit length.
        explained_variance_ratio: (filter), the fraction of the filters' variance along each component; NaN for plain filters.
        principal: Whether these are principal components.
    """

    measure: str = "patch_filters"
    filters: Float[np.ndarray, "filter channel row col"]
    explained_variance_ratio: Float[np.ndarray, "filter"]
    principal: bool

    def to_dataframe(self) -> pd.DataFrame:
        """One row per weight: filter, explained_variance_ratio, channel, row, col, weight."""
        filter_index, channel, row, col = (index.ravel() for index in np.indices(self.filters.shape))
        return pd.DataFrame(
            {
                "filter": filter_index,
                "explained_variance_ratio": self.explained_variance_ratio[filter_index],
                "channel": channel,
                "row": row,
                "col": col,
                "weight": self.filters.ravel(),
            }
        )

    def summary(self) -> pd.DataFrame:
        """One row each for the first 1, 4, 16, ... components: their cumulative explained variance."""
        cumulative = np.cumsum(self.explained_variance_ratio)
        counts = [count for count in (1, 4, 16, 64, 256) if count < len(cumulative)] + [len(cumulative)]
        return pd.DataFrame({"components": counts, "explained variance": cumulative[np.array(counts) - 1]})

    @property
    def title(self) -> str:
        """Title of the figure."""
        if self.principal:
            components = "principal component" if len(self.filters) == 1 else f"{len(self.filters)} principal components"
            channels = self.filters.shape[1]
            colours = {1: "Grey", _COLOURS: "RGB"}.get(channels, f"{channels}-channel")
            return f"{colours} embedding filters\n(first {components})"
        return f"First-layer filters ({len(self.filters)})"

    def key_numbers(self) -> list[KeyNumber]:
        """`low_frequency_share` of the components (NaN for patches of one pixel), and the variance that they explain."""
        try:
            low = low_frequency_share(self.filters)
        except InputError:
            low = float("nan")
        return [("low frequencies", "share", low), ("explained variance", "share", float(self.explained_variance_ratio.sum()))]

    @property
    def panel_title(self) -> str:
        """Title of the result's panel in the overview."""
        return "Patch filters\n(components)"

    def plot(self, *, channels: tuple[int, int, int] | None = None, ax: Axes | None = None) -> Axes:
        """Draw the filters as a grid of small images.

        Args:
            channels: Which three channels to draw as red, green and blue, for filters of other channels than RGB; if None,
                each filter of these is a row of tiles, one per channel.
            ax: Axes to draw on; if None, a new figure.
        """
        from vit_probe.plots import plot_patch_filters

        return plot_patch_filters(self.filters, channels=channels, title=self.title, ax=ax)


@model_measure(result=PatchFiltersResult, command="filters")
def patch_filters(model: nn.Module, *, components: int | None = 28) -> PatchFiltersResult:
    """Principal components of the filters that a model applies to pixels.

    The D filters of the patch embedding are D samples of channel x height x width weights, which PCA centres. The sign of a
    principal component is arbitrary; here its entry of largest magnitude is positive. In hybrids and convolutional networks,
    the filters are those of the first convolution. In models that apply a linear layer to the pixels of each patch, they are
    its weights, arranged as the pixels are; a normalisation of the pixels before it is not part of them.

    Args:
        model: Any model whose first layer is a convolution or a linear layer over the pixels of images, of any channels.
        components: Maximum number of components, in order of explained variance (there are at most as many as filters minus
            one, or as weights per filter); None for the filters themselves, without PCA.

    Raises:
        InputError: If there is no such layer, or `components` is below 1.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7 (left) and section 4.5.

    Examples:
        >>> from vit_probe import VisionTransformer, ViTConfig, patch_filters
        >>> model = VisionTransformer(ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3))
        >>> patch_filters(model, components=4).filters.shape
        (4, 3, 8, 8)
    """
    check_model(model)
    embedding = find_patch_embedding(model)
    weight = embedding.filters.numpy()
    check_finite(weight, "filters")
    filters, channels, rows, cols = weight.shape
    provenance = {
        "model": model_provenance(model),
        "layers": [f"{embedding.path}.weight"],
        "options": {"components": components},
        "versions": software_versions(),
    }
    if components is None:
        unknown = np.full(filters, np.nan)
        return PatchFiltersResult(filters=weight, explained_variance_ratio=unknown, principal=False, provenance=provenance)
    available = min(filters - 1, channels * rows * cols)
    if components < 1:
        raise InputError(f"components must be at least 1 (or None for the filters themselves), got {components}")
    components = min(components, available)
    pca = PCA(n_components=components, svd_solver="full").fit(weight.reshape(filters, -1))
    largest = np.abs(pca.components_).argmax(axis=1)
    signs = np.sign(pca.components_[np.arange(components), largest])
    return PatchFiltersResult(
        filters=rearrange(
            pca.components_ * signs[:, None], "filter (channel row col) -> filter channel row col", row=rows, col=cols
        ),
        explained_variance_ratio=pca.explained_variance_ratio_,
        principal=True,
        provenance=provenance,
    )


def convolution_filters(path: str | Path) -> PatchFiltersResult:
    """Filters that a convolutional network applies to the pixels of a colour image, read from a file of its weights.

    The network itself is not needed: the first layer is taken to be the first parameter in the file of shape
    (filter, 3, row, col) with more than one pixel. Since safetensors files do not keep the order of layers, it is the first by
    name there.

    Args:
        path: A `.safetensors`, `.pt`, `.pth` or `.bin` file that holds a state dict, read without running pickled code.

    Returns:
        The filters in the file's order, with `principal` False. The provenance has the hash of the file as `weights_sha256`.

    Raises:
        InputError: If the file does not exist, cannot be read, or holds no such parameter, or the filters are not finite.

    References:
        Krizhevsky, Sutskever & Hinton 2012, ImageNet classification with deep convolutional neural networks, figure 3;
        compared with a ViT's in Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(nn.Conv2d(3, 6, 5).state_dict(), f"{folder}/cnn.pt")
        ...     result = convolution_filters(f"{folder}/cnn.pt")
        >>> result.filters.shape
        (6, 3, 5, 5)
    """
    path = Path(path).expanduser()
    if path.is_file() and path.suffix not in TENSOR_SUFFIXES:
        raise InputError(f"{path} is not a supported weights file; supported suffixes are {', '.join(TENSOR_SUFFIXES)}")
    state = read_tensors(path)
    candidates = [name for name, value in state.items() if value.ndim == 4 and _is_colour_filter(value)]
    if not candidates:
        shapes = [f"{name} {tuple(value.shape)}" for name, value in state.items()][:3]
        raise InputError(
            f"{path} holds no convolution over {_COLOURS} colour channels, a parameter of shape (filter, {_COLOURS}, row, col) "
            f"of more than one pixel; its first parameters are {', '.join(shapes)}"
        )
    name = min(candidates) if path.suffix == ".safetensors" else candidates[0]
    if len(candidates) > 1:
        others = ", ".join(other for other in candidates if other != name)
        warnings.warn(
            f"{path.name} holds several convolutions over colours; using the filters of {name}, not those of {others}",
            AssumptionWarning,
            stacklevel=2,
        )
    weight = state[name].detach().double().numpy()
    check_finite(weight, f"the filters {name} of {path}")
    return PatchFiltersResult(
        filters=weight,
        explained_variance_ratio=np.full(len(weight), np.nan),
        principal=False,
        provenance={
            "model": {"name": path.name, "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
            "layers": [name],
            "options": {"components": None},
            "versions": software_versions(),
        },
    )


def low_frequency_share(filters: NDArray[Any]) -> float:
    """Share of the filters' spatial variance in the lowest quarter of spatial frequencies, from 0 to 1.

    Frequencies are those of the discrete cosine transform (DCT-II) of each filter and channel; the lowest quarter is the lower
    half along both axes, rounded up. The constant term is not variance and is excluded. For filters of independent random
    weights all frequencies are equally strong, so the share is that of their number: 15 of 63 for 8 x 8 pixels, about 0.24.

    Args:
        filters: (filter, channel, row, col); variances are summed over filters, so that each counts by its scale.

    Raises:
        InputError: If the shape is wrong, a value is not finite, or no filter varies over space.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5, where the components of figure 7 (left) resemble plausible basis
        functions of a patch's fine structure; the paper defines no number, this one is specific to vit_probe.

    Examples:
        >>> smooth = np.cos(np.pi * (np.arange(8) + 0.5) / 8) * np.ones((8, 1))  # half a wave from left to right
        >>> checkerboard = (-1.0) ** np.indices((8, 8)).sum(axis=0)
        >>> [round(low_frequency_share(one[None, None]), 2) for one in (smooth, checkerboard)]
        [1.0, 0.01]
    """
    values = np.asarray(filters, dtype=np.float64)
    if values.ndim != 4 or 0 in values.shape:
        raise InputError(f"filters have shape {values.shape}; they must be (filter, channel, row, col), none empty")
    check_finite(values, "filters")
    rows, cols = values.shape[2:]
    spectrum = (dctn(values, axes=(2, 3), norm="ortho") ** 2).sum(axis=(0, 1))
    constant, spectrum[0, 0] = spectrum[0, 0], 0.0
    if spectrum.sum() <= _ROUNDING * constant:
        raise InputError(f"the filters, of {rows} x {cols} pixels, are constant over space, which is neither smooth nor rough")
    return float(spectrum[: -(-rows // 2), : -(-cols // 2)].sum() / spectrum.sum())


def _is_colour_filter(weight: Tensor) -> bool:
    filters, channels, rows, cols = weight.shape
    return filters > 0 and channels == _COLOURS and rows * cols > 1
