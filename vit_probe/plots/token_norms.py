"""Norms of the patch tokens in each layer."""

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
_TICK_INCHES = 0.26  # fits a number of two digits or a percentage
_BAR_INCHES = 0.1


def plot_token_norms(histogram: pd.DataFrame, layers: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the distribution of patch-token norms in each layer, with the thresholds of artifacts.

    Each layer is a column of bins. Colours give the fraction of the layer's tokens in each bin, on a logarithmic scale, so that
    bins with few tokens remain visible. White dots are medians. In layers with artifacts, an orange line marks the norm above
    which a token is an artifact, and a number at the top the percentage of tokens above it.

    Args:
        histogram: One row per layer and bin; columns layer (from 0), norm_from, norm_to, part (fraction of the layer's tokens,
            in [0, 1]). All layers must have the same bins, without gaps.
        layers: One row per layer; columns layer, median, threshold (norms; NaN if there are no artifacts), artifacts (fraction
            of the tokens, in [0, 1]).
        ax: Axes to draw on; if None, a new figure.

    Returns:
        The axes, with norms on a logarithmic scale. `ax.collections[0]` is the mesh of fractions, with empty bins masked.

    Raises:
        InputError: If columns or rows are missing, or the layers have different bins.

    Examples:
        >>> import pandas as pd
        >>> bins = {"norm_from": [4.0, 8.0, 4.0, 8.0], "norm_to": [8.0, 16.0, 8.0, 16.0]}
        >>> histogram = pd.DataFrame({"layer": [0, 0, 1, 1], **bins, "part": [0.9, 0.1, 0.5, 0.5]})
        >>> layers = pd.DataFrame({"layer": [0, 1], "median": [6.0, 8.0], "threshold": [None, 12.0], "artifacts": [0.0, 0.02]})
        >>> ax = plot_token_norms(histogram, layers)
        >>> ax.get_ylabel()
        'Norm of patch tokens'

    References:
        Darcet et al. 2024, arXiv:2309.16588, figure 4 (a).
    """
    layer, edges, fractions = _mesh(histogram, layers)
    with_artifacts = layers[layers["threshold"].notna()]
    with drawing_axes(ax, figure_size("neurips", 0.5)) as axes:
        mesh = axes.pcolormesh(
            np.append(layer - 0.5, layer[-1] + 0.5),
            edges,
            np.ma.masked_equal(fractions.T, 0),
            cmap="viridis",
            norm=LogNorm(min(fractions[fractions > 0].min(), 0.1), fractions.max()),
            rasterized=True,
        )
        axes.scatter(layers["layer"], layers["median"], s=9, color="white", edgecolors="black", linewidths=0.5, label="median")
        step = _tick_step(axes, len(layer))
        if len(with_artifacts):
            left, right = with_artifacts["layer"] - 0.5, with_artifacts["layer"] + 0.5
            axes.hlines(with_artifacts["threshold"], left, right, color=_THRESHOLD, linewidth=1.5, label="threshold")
            _draw_percentages(axes, with_artifacts.iloc[::step])
        axes.set_yscale("log")
        axes.set_ylim(edges[0], edges[-1])
        _number_norms(axes, edges)
        axes.set_xlim(layer[0] - 0.5, layer[-1] + 0.5)
        axes.xaxis.set_major_locator(MultipleLocator(step))
        axes.set_xlabel("Network depth (layer)")
        axes.set_ylabel("Norm of patch tokens")
        bar_beside(axes, mesh, _BAR_INCHES).set_label("Fraction of the layer's tokens")
        axes.legend(loc="upper left", facecolor="white", frameon=True, framealpha=0.9, edgecolor="none")
    return axes


def _draw_percentages(axes: Axes, layers: pd.DataFrame) -> None:
    """Write the percentage of artifacts above the axes, at the given layers."""
    top = axes.secondary_xaxis("top")
    top.xaxis.set_major_locator(FixedLocator(layers["layer"].tolist()))
    top.xaxis.set_minor_locator(NullLocator())
    texts = {layer: f"{100 * fraction:.1f}" for layer, fraction in zip(layers["layer"], layers["artifacts"], strict=True)}
    top.xaxis.set_major_formatter(FuncFormatter(lambda value, _: texts.get(round(value), "")))
    top.set_xlabel("Artifacts (% of the layer's tokens)")
    top.spines["top"].set_visible(False)


def _number_norms(axes: Axes, edges: NDArray[np.float64]) -> None:
    """Label norms by plain numbers instead of powers of ten, and by more of them where the axis spans few decades."""
    decades = math.log10(edges[-1] / edges[0])
    subs = range(1, 10) if decades < 0.8 else (1, 2, 5) if decades < 3 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _tick_step(axes: Axes, layers: int) -> int:
    """Smallest step between numbered layers at which the numbers do not overlap."""
    return math.ceil(_TICK_INCHES * layers / axes_inches(axes)[0])


def _mesh(histogram: pd.DataFrame, layers: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Check both tables; return the layers, the edges of the bins, and the (layer, bin) fractions."""
    remedy = "pass histogram() and to_dataframe() of a result of token_norms"
    for frame, columns, name in ((histogram, _COLUMNS, "histogram"), (layers, _LAYER_COLUMNS, "table")):
        check_columns(frame, columns, f"the {name} of token norms", remedy)
    if histogram.empty or sorted(layers["layer"]) != sorted(histogram["layer"].unique()):
        raise InputError("the histogram and the table of token norms have different layers, or none; pass those of one result")
    wide = histogram.pivot(index="layer", columns="norm_from", values="part")
    upper_edges = histogram.groupby("norm_from")["norm_to"].agg(["min", "max"])
    edges = np.append(wide.columns.to_numpy(dtype=float), upper_edges["max"].iloc[-1])
    if wide.isna().to_numpy().any() or not np.allclose(upper_edges.to_numpy(), edges[1:, None]):
        raise InputError("the bins of the histogram differ between layers or leave gaps; all layers must have the same bins")
    return wide.index.to_numpy(dtype=np.int64), edges, wide.to_numpy(dtype=float)
