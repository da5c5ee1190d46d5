"""One mark per head: against depth, or sorted within layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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
from vit_probe.plots.layout import axes_inches, bar_beside, check_columns, check_rows
from vit_probe.plots.style import drawing_axes, figure_size, text_inches

__all__ = ["UNIFORM_LINE", "plot_heads", "plot_sorted_heads", "slim_bar", "whole_numbers"]

UNIFORM_LINE: dict[str, Any] = {"color": "#D55E00", "linestyle": (0, (4, 2)), "linewidth": 1.0, "zorder": 1}
_LEGEND_BAND = 1.17  # the axis ends this far above the highest mark, and the legend lies in between
_LEGEND_WIDTH = 0.88  # of the axes; the rest is reserved for a layout that will make them narrower
_MOST_LEGEND = 0.5  # of the axes' height
_TICK_INCHES = 0.21  # width of a number of two digits
_BAR_INCHES = 0.07
_ENDS_INCHES = 0.15  # of a colour bar, taken by the numbers at its two ends
_DODGE = 0.6  # of the distance between two layers, over which error bars are spread
_PALE_TO_BLUE = LinearSegmentedColormap.from_list("pale_to_blue", ["white", "#0072B2"])
_BLUE = "#0072B2"
_MARKERS = "osD^vPX*"


def plot_heads(
    frame: pd.DataFrame,
    *,
    column: str,
    label: str,
    layers: Sequence[int] | None = None,
    ax: Axes | None = None,
    spread: bool = False,
) -> Axes:
    """Draw one dot per head, against depth, with the value that uniform attention has.

    Where the table says how much of each head's attention goes to patches (`patch_mass`, or 1 - `prefix_mass`), a dot is darker
    the more that is: a pale dot is a head that attends mostly to the class token or another prefix token.

    Args:
        frame: One row per head; columns layer (from 0), head, `column`, std (over images), num_images; optional are
            `uniform_COLUMN`, and patch_mass or prefix_mass in [0, 1]. A value of NaN is left out.
        column: What is drawn.
        label: Of the vertical axis, with the unit.
        layers: Which layers to draw; all if None.
        ax: Where to draw; a new figure if None.
        spread: Whether to add error bars of one standard deviation over images, heads set side by side.

    Returns:
        The axes. The dots are `ax.collections[-1]`, in the order of the frame's rows.

    Raises:
        InputError: If columns are missing, there is no row, a layer is not in the table, or rows come from several grids.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7 (right) and figure 11.

    Examples:
        >>> table = pd.DataFrame({"layer": [0, 1], "head": 0, "entropy": [1.0, 2.0], "std": 0.1, "num_images": 8})
        >>> plot_heads(table, column="entropy", label="Entropy (nats)").get_ylabel()
        'Entropy (nats)'
    """
    frame = _chosen(_checked(frame, column), layers)
    uniform = _uniform_by_layer(frame, column)
    layer, value, std = (frame[name].to_numpy(dtype=float) for name in ("layer", column, "std"))
    heads = int(frame["head"].max()) + 1
    shift = (frame["head"].to_numpy(dtype=float) + 0.5) / heads - 0.5 if spread else np.zeros(len(frame))
    position = layer + _DODGE * shift
    patch_mass = _patch_mass(frame)
    with drawing_axes(ax, figure_size("neurips", 0.45)) as axes:
        if spread:
            name = f"±1 std over {int(frame['num_images'].max())} images"
            axes.errorbar(position, value, yerr=std, fmt="none", ecolor="#888888", elinewidth=0.6, zorder=2, label=name)
        colours: dict[str, Any] = {"color": _BLUE} if patch_mass is None else {"c": patch_mass, "cmap": _PALE_TO_BLUE}
        limits: dict[str, Any] = {} if patch_mass is None else {"vmin": 0, "vmax": 1}
        size = _dot_size(axes, layer, spread)
        dots = axes.scatter(position, value, s=size, edgecolors="#1A1A1A", linewidths=0.4, zorder=3, **colours, **limits)
        _draw_uniform(axes, uniform)
        whole_numbers(axes, layer.min() - 0.6, layer.max() + 0.6)
        reach = std if spread else np.zeros(len(frame))
        highest, lowest = float(np.nanmax([*(value + reach), *uniform])), float(np.nanmin([*(value - reach), *uniform]))
        axes.set_xlabel("Network depth (layer)")
        axes.set_ylabel(label)
        room = max(_LEGEND_BAND, _above_marks(axes, _fitting_legend(axes))) if axes.get_legend_handles_labels()[0] else 1.05
        signed = bool((value < 0).any())
        bottom = 1.05 * lowest if signed else 0.0
        axes.set_ylim(bottom, (bottom + room * (highest - bottom)) if highest > bottom else 1.0)
        if signed:
            axes.axhline(0, color="#888888", linewidth=0.6, zorder=0)
        if patch_mass is not None:
            slim_bar(axes, dots, "Attention on patches", [0, 1])
    return axes


def plot_sorted_heads(
    frame: pd.DataFrame,
    *,
    column: str = "distance",
    label: str = "Mean attention distance (pixels)",
    layers: Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the heads of some layers, sorted by a value, one line per layer.

    Args:
        frame: As for `plot_heads`.
        column: What is drawn.
        label: Of the vertical axis, with the unit.
        layers: Which layers, counted from 0; if None, the first two and the last two.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes; its lines are the layers in the order asked for, then uniform attention.

    Raises:
        InputError: As for `plot_heads`.

    References:
        Raghu et al. 2021, arXiv:2108.08810, figure 3.

    Examples:
        >>> table = pd.DataFrame({"layer": 0, "head": [0, 1], "distance": [9.0, 3.0], "std": 0.1, "num_images": 8})
        >>> plot_sorted_heads(table).lines[0].get_ydata().tolist()
        [3.0, 9.0]
    """
    frame = _checked(frame, column)
    known = sorted({int(layer) for layer in frame["layer"]})
    chosen = list(layers) if layers is not None else sorted({*known[:2], *known[-2:]})
    frame = _chosen(frame, chosen)
    uniform = _uniform_by_layer(frame, column)
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.88, len(chosen)))
    with drawing_axes(ax, figure_size("icml", 0.72)) as axes:
        highest, most = float(uniform.max()) if len(uniform) else 0.0, 1
        for index, layer in enumerate(chosen):
            values = np.sort(frame.loc[frame["layer"] == layer, column].to_numpy(dtype=float))
            highest, most = float(np.nanmax([*values, highest])), max(most, len(values))
            marker = _MARKERS[index % len(_MARKERS)]
            axes.plot(values, color=colours[index], marker=marker, markersize=3.5, label=f"layer {layer}")
        for index, value in enumerate(dict.fromkeys(uniform[chosen] if len(uniform) else [])):
            axes.axhline(value, label="_" if index else "uniform", **UNIFORM_LINE)
        lowest = float(np.nanmin([0.0, *frame[column]]))
        bottom, top = 1.05 * lowest, 1.05 * max(0.0, highest)
        axes.set_ylim(bottom, top if top > bottom else 1.0)
        whole_numbers(axes, -0.4, most - 0.6)
        axes.set_xlabel("Sorted attention heads")
        axes.set_ylabel(label)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return axes


def _checked(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    what = f"the table of heads by {column}"
    columns = ("layer", "head", column, "std", "num_images")
    check_columns(frame, columns, what, "pass what the result of a measure of heads gives as to_dataframe()")
    check_rows(frame, what, "measure at least one head")
    return frame


def _chosen(frame: pd.DataFrame, layers: Sequence[int] | None) -> pd.DataFrame:
    if layers is None:
        return frame
    known = sorted({int(layer) for layer in frame["layer"]})
    if not layers or any(layer not in known for layer in layers):
        raise InputError(
            f"layers {list(layers)} were asked for, but there are layers {known[0]} to {known[-1]}; name some of those"
        )
    return frame[frame["layer"].isin(list(layers))]


def _uniform_by_layer(frame: pd.DataFrame, column: str) -> pd.Series[float]:
    """What uniform attention has in each layer; empty if the table does not say.

    Raises:
        InputError: If the rows of a layer come from several grids.
    """
    if f"uniform_{column}" not in frame:
        return pd.Series(dtype=float)
    uniform = frame.groupby("layer")[f"uniform_{column}"].agg(["min", "max"]).astype(float)
    if not np.allclose(uniform["min"], uniform["max"], equal_nan=True):
        layer = int(np.argmax(uniform["max"] - uniform["min"]))
        lowest, highest = uniform.iloc[layer]
        raise InputError(
            f"the rows of a layer come from several grids (uniform_{column} from {lowest:.6g} to {highest:.6g}); draw one grid "
            "at a time"
        )
    return uniform["min"]


def _patch_mass(frame: pd.DataFrame) -> NDArray[np.float64] | None:
    """The share of each head's attention that goes to patches, where the table says."""
    if "patch_mass" in frame:
        return frame["patch_mass"].to_numpy(dtype=float)
    return 1 - frame["prefix_mass"].to_numpy(dtype=float) if "prefix_mass" in frame else None


def _draw_uniform(axes: Axes, uniform: pd.Series[float]) -> None:
    if uniform.nunique() == 1:
        axes.axhline(uniform.iloc[0], label="uniform attention", **UNIFORM_LINE)
    elif uniform.notna().any():  # attention within windows: what uniform attention has differs by layer
        edges = np.append(uniform.index - 0.5, uniform.index[-1] + 0.5)
        axes.stairs(uniform, edges, baseline=None, label="uniform attention", **UNIFORM_LINE)


def slim_bar(axes: Axes, marks: ScalarMappable, label: str, ticks: list[int]) -> None:
    """Draw a slim colour bar beside the axes, with its label between the numbers at its two ends.

    Beside low axes the first word of the label is left out.
    """
    bar = bar_beside(axes, marks, _BAR_INCHES, ticks=ticks)
    if " " in label and text_inches(label) > axes_inches(axes)[1] - _ENDS_INCHES:
        label = label.partition(" ")[2].capitalize()
    bar.set_label(label, labelpad=-3)


def whole_numbers(axes: Axes, lowest: float, highest: float) -> None:
    """Set the limits of the horizontal axis, and label as many of its whole numbers as fit."""
    axes.set_xlim(lowest, highest)
    axes.xaxis.set_major_locator(MultipleLocator(math.ceil(_TICK_INCHES * (highest - lowest) / axes_inches(axes)[0])))


def _fitting_legend(axes: Axes) -> Legend:
    """Draw the legend in one line; in several if the axes are too narrow, and in short words if they still are."""
    handles, labels = axes.get_legend_handles_labels()
    short = [label.split(" over ")[0].removesuffix(" attention") for label in labels]
    for names, columns in ((labels, len(labels)), (labels, 1), (short, 1)):
        legend = axes.legend(handles, names, loc="upper left", ncols=columns, frameon=False)
        if legend.get_window_extent().width <= _LEGEND_WIDTH * axes.get_window_extent().width:
            break
    return legend


def _above_marks(axes: Axes, legend: Legend) -> float:
    """The axis limit, relative to the highest mark, that leaves room for the legend."""
    part = float(legend.get_window_extent().height / axes.get_window_extent().height)
    return 1 / (1 - min(1.25 * part + 0.02, _MOST_LEGEND))


def _dot_size(axes: Axes, layer: NDArray[np.float64], spread: bool) -> float:
    """Area of a dot in square points: smaller where layers are close, so that neighbours do not touch."""
    pitch = axes_inches(axes)[0] / (layer.max() - layer.min() + 1.2)
    return float(np.clip(0.75 * 72 * pitch, 2.5, 3.4 if spread else 4.2) ** 2)
