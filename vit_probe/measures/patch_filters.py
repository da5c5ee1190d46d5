"""What the first layer of a model responds to: its RGB filters, and their principal components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from einops import rearrange
from jaxtyping import Float
from sklearn.decomposition import PCA
from torch import nn

from vit_probe.errors import InputError
from vit_probe.geometry import first_convolution
from vit_probe.results import Result, check_finite, software_versions
from vit_probe.run import model_provenance

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PatchFiltersResult", "patch_filters"]


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
