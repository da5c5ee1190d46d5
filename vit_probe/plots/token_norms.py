"""Norms of the patch tokens in every layer."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MultipleLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from vit_probe.errors import InputError
from vit_probe.plots.layout import axes_inches, bar_beside, check_columns
from vit_probe.plots.style import drawing_axes, figure_size

__all__ = ["plot_token_norms"]

_COLUMNS = ("layer", "norm_from", "norm_to", "part")
_LAYER_COLUMNS = ("layer", "median", "threshold", "artifacts")
_THRESHOLD = "#D55E00"
_TICK_INCHES = 0.26  # what a number of two digits, or a percentage, needs
_BAR_INCHES = 0.1


def plot_token_norms(histogram: pd.DataFrame, layers: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how the norms of patch tokens are distributed in every layer, with the thresholds of artifacts.

    A column a layer, shaded by the part of the layer's tokens in each bin, on a logarithmic scale, so that few tokens are
    seen, too; a white dot is the median. Where a layer has artifacts, an orange line is the norm that they lie above, and the
    numbers at the top are the part of the tokens that do.

    Args:
        histogram: One row a layer and bin; columns layer (from 0), norm_from, norm_to, part (of the layer's tokens, in
            [0, 1]). All layers have the same bins, one above the other.
        layers: One row a layer; columns layer, median, threshold (norms; NaN where there are no artifacts), artifacts (in
            [0, 1]).
        ax: Where to draw; a new figure if None.

    Returns:
        The axes, with norms on a logarithmic scale. `ax.collections[0]` is the mesh of parts, empty bins masked.

    Raises:
        InputError: If columns are missing, there is no row, or the layers have other bins.

    References:
        Darcet et al. 2024, arXiv:2309.16588, figure 4 (a).
    """
    number, edges, parts = _table(histogram, layers)
    found = layers[layers["threshold"].notna()]
    with drawing_axes(ax, figure_size("neurips", 0.5)) as axes:
        mesh = axes.pcolormesh(
            np.append(number - 0.5, number[-1] + 0.5),
            edges,
            np.ma.masked_equal(parts.T, 0),
            cmap="viridis",
            norm=LogNorm(min(parts[parts > 0].min(), 0.1), parts.max()),
            rasterized=True,
        )
        axes.scatter(layers["layer"], layers["median"], s=9, color="white", edgecolors="black", linewidths=0.5, label="median")
        if len(found):
            low, high = found["layer"] - 0.5, found["layer"] + 0.5
            axes.hlines(found["threshold"], low, high, color=_THRESHOLD, linewidth=1.5, label="threshold")
            _percentages(axes, found.iloc[:: _step(axes, len(number))])
        axes.set_yscale("log")
        axes.set_ylim(edges[0], edges[-1])
        _number_norms(axes, edges)
        axes.set_xlim(number[0] - 0.5, number[-1] + 0.5)
        axes.xaxis.set_major_locator(MultipleLocator(_step(axes, len(number))))
        axes.set_xlabel("Network depth (layer)")
        axes.set_ylabel("Norm of patch tokens")
        bar_beside(axes, mesh, _BAR_INCHES).set_label("Part of the layer's tokens")
        axes.legend(loc="upper left", facecolor="white", frameon=True, framealpha=0.9, edgecolor="none")
    return axes


def _percentages(axes: Axes, shown: pd.DataFrame) -> None:
    """Above the axes, the part of some layers' tokens that are artifacts."""
    top = axes.secondary_xaxis("top")
    top.xaxis.set_major_locator(FixedLocator(shown["layer"].tolist()))
    top.xaxis.set_minor_locator(NullLocator())
    texts = {layer: f"{100 * part:.1f}" for layer, part in zip(shown["layer"], shown["artifacts"], strict=True)}
    top.xaxis.set_major_formatter(FuncFormatter(lambda value, _: texts.get(round(value), "")))
    top.set_xlabel("Artifacts (% of the layer's tokens)")
    top.spines["top"].set_visible(False)


def _number_norms(axes: Axes, edges: NDArray[np.float64]) -> None:
    """Numbers rather than powers, on a short axis more of them."""
    decades = math.log10(edges[-1] / edges[0])
    subs = range(1, 10) if decades < 0.8 else (1, 2, 5) if decades < 3 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _step(axes: Axes, layers: int) -> int:
    """Every how many layers there is room for a number."""
    return math.ceil(_TICK_INCHES * layers / axes_inches(axes)[0])


def _table(histogram: pd.DataFrame, layers: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Layers, edges of the bins, and (layer, bin) parts, once the frames are seen to be ones that can be drawn."""
    remedy = "pass what the result of token_norms gives as histogram() and to_dataframe()"
    for frame, columns, what in ((histogram, _COLUMNS, "histogram"), (layers, _LAYER_COLUMNS, "table")):
        check_columns(frame, columns, f"the {what} of token norms", remedy)
    if histogram.empty or sorted(layers["layer"]) != sorted(histogram["layer"].unique()):
        raise InputError("the histogram and the table of token norms must have rows of the same layers, one layer at least")
    wide = histogram.pivot(index="layer", columns="norm_from", values="part")
    tops = histogram.groupby("norm_from")["norm_to"].agg(["min", "max"])
    edges = np.append(wide.columns.to_numpy(dtype=float), tops["max"].iloc[-1])
    if wide.isna().to_numpy().any() or not np.allclose(tops.to_numpy(), edges[1:, None]):
        raise InputError("the layers of the histogram must have the same bins, one above the other")
    return wide.index.to_numpy(dtype=np.int64), edges, wide.to_numpy(dtype=float)
