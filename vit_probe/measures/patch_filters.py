"""What the first layer of a model responds to: its RGB filters, and their principal components."""

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

from vit_probe.checkpoints.files import TENSOR_SUFFIXES, read_tensors
from vit_probe.errors import AssumptionWarning, InputError
from vit_probe.results import Result, check_finite, software_versions
from vit_probe.runner.run import model_provenance
from vit_probe.tokens.grid import first_convolution

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "PatchFiltersResult",
    "convolution_filters",
    "low_frequency_share",
    "patch_filters",
]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PatchFiltersResult(Result):
    """Filters of a first layer, or their principal components.

    Args:
        filters: (filter, channel, row, col); components have unit length and arbitrary scale.
        explained_variance_ratio: (filter), the part of the filters' variance along each component; NaN for plain filters.
        principal: Whether these are principal components.
    """

    filters: Float[np.ndarray, "filter channel row col"]
    explained_variance_ratio: Float[np.ndarray, "filter"]
    principal: bool

    def to_dataframe(self) -> pd.DataFrame:
        """One row a weight: filter, explained_variance_ratio, channel, row, col, weight."""
        index, channel, row, col = (i.ravel() for i in np.indices(self.filters.shape))
        return pd.DataFrame(
            {
                "filter": index,
                "explained_variance_ratio": self.explained_variance_ratio[index],
                "channel": channel,
                "row": row,
                "col": col,
                "weight": self.filters.ravel(),
            }
        )

    def summary(self) -> pd.DataFrame:
        """One row for the first component, the first 4, 16, ...: explained variance together."""
        cumulated = np.cumsum(self.explained_variance_ratio)
        counts = [count for count in (1, 4, 16, 64, 256) if count < len(cumulated)] + [len(cumulated)]
        return pd.DataFrame({"components": counts, "explained variance": cumulated[np.array(counts) - 1]})

    @property
    def title(self) -> str:
        """What the figure is called."""
        if self.principal:
            components = "principal component" if len(self.filters) == 1 else f"{len(self.filters)} principal components"
            return f"RGB embedding filters\n(first {components})"
        return f"First-layer filters ({len(self.filters)})"

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """The filters as a grid of small pictures."""
        from vit_probe.plots import plot_patch_filters

        return plot_patch_filters(self.filters, title=self.title, ax=ax)


def patch_filters(model: nn.Module, *, components: int | None = 28) -> PatchFiltersResult:
    """Principal components of the filters that a model applies to pixels.

    The D filters of the patch embedding are D samples of height x width x channel weights; PCA centres them. Signs of principal
    components are arbitrary: here the entry of largest magnitude is positive. For a hybrid, and for any convolutional
    network, these are the filters of its first convolution.

    Args:
        model: Any model whose first layer is a convolution over 1 or 3 colour channels.
        components: At most so many, in order of explained variance (there are no more than filters less one, or weights in a
            filter); None for the filters themselves, without PCA.

    Raises:
        InputError: If there is no such convolution, or `components` is below 1.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7 (left) and section 4.5.
    """
    name, weight = _first_convolution(model)
    check_finite(weight, "filters")
    filters, channels, rows, cols = weight.shape
    provenance = {
        "model": model_provenance(model),
        "layers": [name],
        "options": {"components": components},
        "versions": software_versions(),
    }
    if components is None:
        nothing = np.full(filters, np.nan)
        return PatchFiltersResult(filters=weight, explained_variance_ratio=nothing, principal=False, provenance=provenance)
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


def _first_convolution(model: nn.Module) -> tuple[str, Float[np.ndarray, "filter channel row col"]]:
    name, module = first_convolution(model)
    if module is not None and module.in_channels in (1, 3):
        return f"{name}.weight", module.weight.detach().cpu().double().numpy()
    raise InputError(f"{type(model).__name__} has no convolution over 1 or 3 colour channels whose filters could be shown")


_ROUNDING = 1e-24  # of the constant's square: what the transform of a constant filter leaves elsewhere


def low_frequency_share(filters: NDArray[Any]) -> float:
    """The part of the filters' variance over space that lies in the lowest quarter of spatial frequencies.

    Frequencies are those of the cosine transform (DCT-II) of each filter and channel. The lowest quarter are the lower half of
    them along either axis, rounded up. The constant is no variance and left out. For filters of independent random weights all
    frequencies are alike, and the share is that of their number: 15 of 63 for 8 x 8 pixels, about 0.24.

    Args:
        filters: (filter, channel, row, col); their variances are added up, so that a filter counts by its scale.

    Returns:
        The share, from 0 to 1.

    Raises:
        InputError: If the shape is another, a value is not finite, or no filter varies over space.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5, where the components of figure 7 (left) resemble plausible basis
        functions of a patch's fine structure; this number is ours.
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


_COLOURS = 3


def convolution_filters(path: str | Path) -> PatchFiltersResult:
    """The filters that a convolutional network applies to the pixels of a colour image, as they are.

    The network itself is not needed: its first layer is the first parameter in the file of shape (filter, 3, row, col), of more
    than one pixel. A safetensors file keeps no order of layers, so that there it is the first by name.

    Args:
        path: A `.safetensors`, `.pt`, `.pth` or `.bin` file that holds a state dict, read without running pickled code.

    Returns:
        The filters in the file's order, `principal` False. The provenance has the hash of the file as `weights_sha256`.

    Raises:
        InputError: If there is no such file, it cannot be read, or holds no such parameter, or one that is not finite.

    References:
        Krizhevsky, Sutskever & Hinton 2012, ImageNet classification with deep convolutional neural networks, figure 3;
        compared with a ViT's in Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5.
    """
    path = Path(path).expanduser()
    if path.is_file() and path.suffix not in TENSOR_SUFFIXES:
        raise InputError(f"{path} is no file of weights that can be read; known are {', '.join(TENSOR_SUFFIXES)}")
    state = read_tensors(path)
    found = [name for name, value in state.items() if value.ndim == 4 and _sees_colours(value)]
    if not found:
        shapes = [f"{name} {tuple(value.shape)}" for name, value in state.items()][:3]
        raise InputError(
            f"{path} holds no convolution over {_COLOURS} colour channels, a parameter of shape (filter, {_COLOURS}, row, col) "
            f"of more than one pixel; its first parameters are {', '.join(shapes)}"
        )
    name = min(found) if path.suffix == ".safetensors" else found[0]
    if len(found) > 1:
        others = ", ".join(other for other in found if other != name)
        warnings.warn(f"of {path.name} the filters of {name} are taken, not those of {others}", AssumptionWarning, stacklevel=2)
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


def _sees_colours(weight: Tensor) -> bool:
    filters, channels, rows, cols = weight.shape
    return filters > 0 and channels == _COLOURS and rows * cols > 1
