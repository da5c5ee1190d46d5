"""How a classifier's probability falls as patches are taken away."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from vit_probe.errors import InputError
from vit_probe.plots.style import OKABE_ITO, drawing_axes, figure_size

__all__ = ["plot_deletion"]

_COLUMNS = ("order", "image", "fraction", "probability")
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1.5, 1, 1.5)))


def plot_deletion(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the mean probability of the predicted class against the part of the patches taken away, a line an order.

    The intervals of the differences, image by image, are in `DeletionResult.summary`.

    Args:
        frame: One row a step of an image in an order; columns order, image, fraction (of the patches, in [0, 1]), probability.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes; its lines are the orders, as they come first in the frame.

    Raises:
        InputError: If columns are missing or there is no row.

    References:
        Petsiuk et al. 2018, arXiv:1806.07421, figure 1 (deletion).
    """
    missing = [name for name in _COLUMNS if name not in frame]
    if missing or frame.empty:
        raise InputError(
            f"a table of deletion needs rows with columns {', '.join(_COLUMNS)}; got {len(frame)} rows with {list(frame)}"
        )
    with drawing_axes(ax, figure_size("icml", 0.8)) as axes:
        for index, (order, rows) in enumerate(frame.groupby("order", sort=False)):
            mean = rows.groupby("fraction")["probability"].mean()
            colour, dash = OKABE_ITO[index % len(OKABE_ITO)], _DASHES[index % len(_DASHES)]
            axes.plot(mean.index, mean, color=colour, linestyle=dash, label=str(order))
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("Patches taken away")
        axes.set_ylabel("Probability of the predicted class")
        axes.legend(title="Taken away first", alignment="left", loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return axes
