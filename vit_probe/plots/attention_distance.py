"""Mean attention distance: against depth, and with the heads of a layer sorted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.legend import Legend
from matplotlib.ticker import MultipleLocator
from numpy.typing import NDArray

from vit_probe.errors import InputError
from vit_probe.plots.style import drawing_axes, figure_size

__all__ = ["plot_attention_distance", "plot_sorted_heads"]

_COLUMNS = ("layer", "head", "distance", "std", "patch_mass", "uniform_distance", "num_images")
_LINE = {"color": "#D55E00", "linestyle": (0, (4, 2)), "linewidth": 1.0, "zorder": 1}
_LEGEND_BAND = 1.17  # the axis ends so much above the highest mark, and the legend lies in between
_LEGEND_WIDTH = 0.88  # of the axes, the rest being kept for a layout that is yet to narrow them
_MOST_LEGEND = 0.5  # of the axes' height
_TICK_INCHES = 0.21  # what a number of two digits needs
_DODGE = 0.6  # of the room between two layers, over which error bars are spread
_PALE_TO_BLUE = LinearSegmentedColormap.from_list("pale_to_blue", ["white", "#0072B2"])
_MARKERS = "osD^vPX*"


def plot_attention_distance(frame: pd.DataFrame, *, ax: Axes | None = None, spread: bool = False) -> Axes:
    """Draw one dot a head, against depth, with the distance that uniform attention would have.

    The darker a dot, the more of its head's attention goes to patches at all; a pale dot is a head that looks
    mostly at the class token or another prefix token, so that its distance says little.

    Args:
        frame: One row a head; columns layer (from 0), head, distance (pixels), std (over images, pixels),
            patch_mass (in [0, 1]), uniform_distance (pixels), num_images. A distance of NaN is left out.
        ax: Where to draw; a new figure if None.
        spread: Whether to add error bars of one standard deviation over images, heads set side by side.

    Returns:
        The axes. The dots are `ax.collections[-1]`, in the order of the frame's rows.

    Raises:
        InputError: If columns are missing, there is no row, or rows come from several grids.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7 (right) and figure 11.
    """
    uniform = _uniform_distance(frame)
    layer, distance, std = (frame[name].to_numpy(dtype=float) for name in ("layer", "distance", "std"))
    heads = int(frame["head"].max()) + 1
    shift = (frame["head"].to_numpy(dtype=float) + 0.5) / heads - 0.5 if spread else np.zeros(len(frame))
    position = layer + _DODGE * shift
    with drawing_axes(ax, figure_size("neurips", 0.45)) as axes:
        if spread:
            label = f"±1 std over {int(frame['num_images'].max())} images"
            axes.errorbar(position, distance, yerr=std, fmt="none", ecolor="#888888", elinewidth=0.6, zorder=2, label=label)
        dots = axes.scatter(
            position,
            distance,
            c=frame["patch_mass"].to_numpy(dtype=float),
            cmap=_PALE_TO_BLUE,
            vmin=0,
            vmax=1,
            s=_dot_size(axes, layer, spread),
            edgecolors="#1A1A1A",
            linewidths=0.4,
            zorder=3,
        )
        if uniform.nunique() == 1:
            axes.axhline(uniform.iloc[0], label="uniform attention", **_LINE)  # type: ignore[arg-type]
        else:  # attention within windows: what uniform attention reaches differs by layer
            edges = np.append(uniform.index - 0.5, uniform.index[-1] + 0.5)
            axes.stairs(uniform, edges, baseline=None, label="uniform attention", **_LINE)  # type: ignore[arg-type]
        _whole_numbers(axes, layer.min() - 0.6, layer.max() + 0.6)
        highest = float(np.nanmax([*(distance + std if spread else distance), *uniform]))
        axes.set_xlabel("Network depth (layer)")
        axes.set_ylabel("Mean attention distance (pixels)")
        axes.set_ylim(0, (highest or 1.0) * max(_LEGEND_BAND, _above_marks(axes, _fitting_legend(axes))))
        _mass_bar(axes, dots)
    return axes


def plot_sorted_heads(frame: pd.DataFrame, *, layers: Sequence[int] | None = None, ax: Axes | None = None) -> Axes:
    """Draw the heads of some layers, sorted by distance, one line a layer.

    Args:
        frame: As for `plot_attention_distance`.
        layers: Which layers, counted from 0; if None, the first two and the last two.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes; its lines are the layers in the order asked for, then uniform attention.

    Raises:
        InputError: As for `plot_attention_distance`, and if a layer is not in the frame or none is asked for.

    References:
        Raghu et al. 2021, arXiv:2108.08810, figure 3.
    """
    uniform = _uniform_distance(frame)
    known = sorted({int(layer) for layer in frame["layer"]})
    chosen = list(layers) if layers is not None else sorted({*known[:2], *known[-2:]})
    absent = [layer for layer in chosen if layer not in known]
    if absent or not chosen:
        raise InputError(f"layers {chosen} were asked for, but there are layers {known[0]} to {known[-1]}; name some of those")
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.88, len(chosen)))
    with drawing_axes(ax, figure_size("icml", 0.72)) as axes:
        highest, most = float(uniform[chosen].max()), 1
        for index, layer in enumerate(chosen):
            distances = np.sort(frame.loc[frame["layer"] == layer, "distance"].to_numpy(dtype=float))
            highest, most = float(np.nanmax([*distances, highest])), max(most, len(distances))
            marker = _MARKERS[index % len(_MARKERS)]
            axes.plot(distances, color=colours[index], marker=marker, markersize=3.5, label=f"layer {layer}")
        for index, value in enumerate(dict.fromkeys(uniform[chosen])):
            axes.axhline(value, label="_" if index else "uniform", **_LINE)  # type: ignore[arg-type]
        axes.set_ylim(0, (highest or 1.0) * 1.05)
        _whole_numbers(axes, -0.4, most - 0.6)
        axes.set_xlabel("Sorted attention heads")
        axes.set_ylabel("Mean attention distance (pixels)")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return axes


def _inches(axes: Axes) -> float:
    return float(axes.get_window_extent().width / axes.figure.dpi)


def _fitting_legend(axes: Axes) -> Legend:
    """The legend in one line; where the axes are too narrow, in several, and where they still are, in few words."""
    handles, labels = axes.get_legend_handles_labels()
    short = [label.split(" over ")[0].removesuffix(" attention") for label in labels]
    for names, columns in ((labels, len(labels)), (labels, 1), (short, 1)):
        legend = axes.legend(handles, names, loc="upper left", ncols=columns, frameon=False)
        if legend.get_window_extent().width <= _LEGEND_WIDTH * axes.get_window_extent().width:
            break
    return legend


def _above_marks(axes: Axes, legend: Legend) -> float:
    """Where the axis must end, relative to the highest mark, to leave room for the legend."""
    part = float(legend.get_window_extent().height / axes.get_window_extent().height)
    return 1 / (1 - min(1.25 * part + 0.02, _MOST_LEGEND))


def _whole_numbers(axes: Axes, lowest: float, highest: float) -> None:
    """Limit the horizontal axis, and number as many of its whole numbers as have room."""
    axes.set_xlim(lowest, highest)
    axes.xaxis.set_major_locator(MultipleLocator(math.ceil(_TICK_INCHES * (highest - lowest) / _inches(axes))))


def _dot_size(axes: Axes, layer: NDArray[np.float64], spread: bool) -> float:
    """Area of a dot in square points: smaller where layers crowd, so that neighbours stay apart."""
    pitch = _inches(axes) / (layer.max() - layer.min() + 1.2)
    return float(np.clip(0.75 * 72 * pitch, 2.5, 3.4 if spread else 4.2) ** 2)


def _mass_bar(axes: Axes, dots: ScalarMappable) -> None:
    """The colour bar of the dots, slim and outside the axes."""
    thickness = 0.07 / _inches(axes)
    bar = axes.figure.colorbar(dots, cax=axes.inset_axes((1 + thickness, 0.0, thickness, 1.0)), ticks=[0, 1])
    bar.set_label("Attention on patches", labelpad=-3)


def _uniform_distance(frame: pd.DataFrame) -> pd.Series[float]:
    """The distance of uniform attention in each layer, once the frame is seen to be one that can be drawn."""
    missing = [name for name in _COLUMNS if name not in frame.columns]
    if missing:
        raise InputError(
            f"the table of attention distances lacks the columns {', '.join(missing)}; "
            "pass what the result of mean_attention_distance gives as to_dataframe()"
        )
    if frame.empty:
        raise InputError("the table of attention distances has no rows; measure at least one head")
    uniform = frame.groupby("layer")["uniform_distance"].agg(["min", "max"]).astype(float)
    if not np.allclose(uniform["min"], uniform["max"]):
        layer = int(np.argmax(uniform["max"] - uniform["min"]))
        lowest, highest = uniform.iloc[layer]
        raise InputError(
            f"the rows of a layer belong to grids whose uniform attention has distances from {lowest:.6g} to {highest:.6g}; "
            "draw one grid at a time"
        )
    return uniform["min"]
