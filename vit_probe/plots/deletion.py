"""Probability of a classifier as patches are deleted."""

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
    """Draw the mean probability of the predicted class against the fraction of patches deleted, one line per order.

    Confidence intervals of the paired differences between orders are in `DeletionResult.summary`.

    Args:
        frame: One row per order, image and step; columns order, image, fraction (of patches deleted, in [0, 1]), probability.
        ax: Axes to draw on; if None, a new figure.

    Returns:
        The axes, with one line per order, in the order of first appearance in the table.

    Raises:
        InputError: If columns are missing or the table has no rows.

    Examples:
        >>> import pandas as pd
        >>> steps = {"image": 0, "fraction": [0.0, 0.5, 1.0]}
        >>> rollout = pd.DataFrame({"order": "rollout", "probability": [0.9, 0.3, 0.1], **steps})
        >>> random = pd.DataFrame({"order": "random", "probability": [0.9, 0.6, 0.1], **steps})
        >>> ax = plot_deletion(pd.concat([rollout, random]))
        >>> [line.get_label() for line in ax.lines]
        ['rollout', 'random']

    References:
        Petsiuk et al. 2018, arXiv:1806.07421, figure 1 (deletion).
    """
    missing = [name for name in _COLUMNS if name not in frame]
    if missing or frame.empty:
        raise InputError(
            f"the table of deletion has {len(frame)} rows and columns {list(frame)}; "
            f"it must have rows and columns {', '.join(_COLUMNS)}"
        )
    with drawing_axes(ax, figure_size("icml", 0.8)) as axes:
        for index, (order, rows) in enumerate(frame.groupby("order", sort=False)):
            mean = rows.groupby("fraction")["probability"].mean()
            colour, dash = OKABE_ITO[index % len(OKABE_ITO)], _DASHES[index % len(_DASHES)]
            axes.plot(mean.index, mean, color=colour, linestyle=dash, label=str(order))
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("Patches deleted")
        axes.set_ylabel("Probability of the predicted class")
        axes.legend(title="Deleted first", alignment="left", loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return axes
