"""What the pictures with a mark for every head have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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
from vit_probe.plots.style import text_inches

__all__ = [
    "UNIFORM_LINE",
    "HeadQuantity",
    "dots_against_depth",
    "slim_bar",
    "uniform_by_layer",
    "whole_numbers",
]


UNIFORM_LINE: dict[str, Any] = {"color": "#D55E00", "linestyle": (0, (4, 2)), "linewidth": 1.0, "zorder": 1}
_LEGEND_BAND = 1.17  # the axis ends so much above the highest mark, and the legend lies in between
_LEGEND_WIDTH = 0.88  # of the axes, the rest being kept for a layout that is yet to narrow them
_MOST_LEGEND = 0.5  # of the axes' height
_TICK_INCHES = 0.21  # what a number of two digits needs
_BAR_INCHES = 0.07
_ENDS_INCHES = 0.15  # of a colour bar, which the numbers at its two ends take
_DODGE = 0.6  # of the room between two layers, over which error bars are spread
_PALE_TO_BLUE = LinearSegmentedColormap.from_list("pale_to_blue", ["white", "#0072B2"])


@dataclass(frozen=True)
class HeadQuantity:
    """A quantity of every head, as it stands in a table with one row a head.

    Args:
        column: Its name; that of uniform attention is `uniform_` and this name.
        plural: Of the name.
        mass: The column with the part of the attention on patches, or on prefix tokens.
        label: Of its axis, with the unit.
        measure: The function whose result gives such a table.
    """

    column: str
    plural: str
    mass: str
    label: str
    measure: str

    @property
    def columns(self) -> tuple[str, ...]:
        """What the table must have."""
        return ("layer", "head", self.column, "std", self.mass, f"uniform_{self.column}", "num_images")


def dots_against_depth(
    axes: Axes,
    frame: pd.DataFrame,
    quantity: HeadQuantity,
    uniform: pd.Series[float],
    patch_mass: NDArray[np.float64],
    *,
    spread: bool,
) -> None:
    """Draw one dot a head, against depth, and what uniform attention would have; with the colour bar of the dots.

    Args:
        axes: Where to draw; the dots become `axes.collections[-1]`.
        frame: One row a head, as `uniform_by_layer` has checked it.
        quantity: What is drawn.
        uniform: What `uniform_by_layer` returned.
        patch_mass: (row), in [0, 1], the part of each head's attention that falls on patches; the larger, the darker its dot.
        spread: Whether to add error bars of one standard deviation over images, heads set side by side.
    """
    layer, value, std = (frame[name].to_numpy(dtype=float) for name in ("layer", quantity.column, "std"))
    heads = int(frame["head"].max()) + 1
    shift = (frame["head"].to_numpy(dtype=float) + 0.5) / heads - 0.5 if spread else np.zeros(len(frame))
    position = layer + _DODGE * shift
    if spread:
        label = f"±1 std over {int(frame['num_images'].max())} images"
        axes.errorbar(position, value, yerr=std, fmt="none", ecolor="#888888", elinewidth=0.6, zorder=2, label=label)
    dots = axes.scatter(
        position,
        value,
        c=patch_mass,
        cmap=_PALE_TO_BLUE,
        vmin=0,
        vmax=1,
        s=_dot_size(axes, layer, spread),
        edgecolors="#1A1A1A",
        linewidths=0.4,
        zorder=3,
    )
    if uniform.nunique() == 1:
        axes.axhline(uniform.iloc[0], label="uniform attention", **UNIFORM_LINE)
    else:  # attention within windows: what uniform attention has differs by layer
        edges = np.append(uniform.index - 0.5, uniform.index[-1] + 0.5)
        axes.stairs(uniform, edges, baseline=None, label="uniform attention", **UNIFORM_LINE)
    whole_numbers(axes, layer.min() - 0.6, layer.max() + 0.6)
    highest = float(np.nanmax([*(value + std if spread else value), *uniform]))
    axes.set_xlabel("Network depth (layer)")
    axes.set_ylabel(quantity.label)
    axes.set_ylim(0, (highest or 1.0) * max(_LEGEND_BAND, _above_marks(axes, _fitting_legend(axes))))
    slim_bar(axes, dots, "Attention on patches", [0, 1])


def uniform_by_layer(frame: pd.DataFrame, quantity: HeadQuantity) -> pd.Series[float]:
    """What uniform attention has in each layer.

    Raises:
        InputError: If columns are missing, there is no row, or the rows of a layer come from several grids.
    """
    what = f"the table of attention {quantity.plural}"
    check_columns(frame, quantity.columns, what, f"pass what the result of {quantity.measure} gives as to_dataframe()")
    check_rows(frame, what, "measure at least one head")
    uniform = frame.groupby("layer")[f"uniform_{quantity.column}"].agg(["min", "max"]).astype(float)
    if not np.allclose(uniform["min"], uniform["max"]):
        layer = int(np.argmax(uniform["max"] - uniform["min"]))
        lowest, highest = uniform.iloc[layer]
        raise InputError(
            f"the rows of a layer belong to grids whose uniform attention has {quantity.plural} from {lowest:.6g} to "
            f"{highest:.6g}; draw one grid at a time"
        )
    return uniform["min"]


def slim_bar(axes: Axes, marks: ScalarMappable, label: str, ticks: list[int]) -> None:
    """The colour bar of some marks, slim and outside the axes, its label between the numbers at its two ends.

    Beside low axes the first word of the label is left out.
    """
    bar = bar_beside(axes, marks, _BAR_INCHES, ticks=ticks)
    if " " in label and text_inches(label) > axes_inches(axes)[1] - _ENDS_INCHES:
        label = label.partition(" ")[2].capitalize()
    bar.set_label(label, labelpad=-3)


def whole_numbers(axes: Axes, lowest: float, highest: float) -> None:
    """Limit the horizontal axis, and number as many of its whole numbers as have room."""
    axes.set_xlim(lowest, highest)
    axes.xaxis.set_major_locator(MultipleLocator(math.ceil(_TICK_INCHES * (highest - lowest) / axes_inches(axes)[0])))


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


def _dot_size(axes: Axes, layer: NDArray[np.float64], spread: bool) -> float:
    """Area of a dot in square points: smaller where layers crowd, so that neighbours stay apart."""
    pitch = axes_inches(axes)[0] / (layer.max() - layer.min() + 1.2)
    return float(np.clip(0.75 * 72 * pitch, 2.5, 3.4 if spread else 4.2) ** 2)
