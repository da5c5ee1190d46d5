"""What the studies have in common: how each keeps what it shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_probe.atomic_io import write_bytes
from vit_probe.cli.export import root_figure
from vit_probe.measures.base.running_stats import RunningStats
from vit_probe.plots import save_figure

__all__ = ["VERDICTS", "Finding", "are_local", "in_first_third", "in_last_third", "keep", "more_than_nothing"]

VERDICTS = {True: "as published", False: "not as published", None: "undecided"}
_ANSWERS = {True: "yes", False: "no", None: "open"}


@dataclass(frozen=True)
class Finding:
    """What a study found.

    Args:
        text: One to three sentences, with their numbers.
        published: What has been published, each in a few words, and whether it is so here; None where this stays open: it was
            not tested, or there is too little to tell.
    """

    text: str
    published: Mapping[str, bool | None]

    @property
    def holds(self) -> bool | None:
        """Whether all that has been published is so here; None if that stays open."""
        found = set(self.published.values())
        return False if False in found else None if None in found else True

    def lines(self) -> list[str]:
        """A line for each thing that has been published."""
        return [f"{_ANSWERS[holds]}: {what}" for what, holds in self.published.items()]


def are_local(heads: pd.DataFrame) -> pd.Series[bool]:
    """Which rows of a table of attention distances are of heads that look near: less than half as far as uniform attention."""
    return heads["distance"] < heads["uniform_distance"] / 2


def in_first_third(heads: pd.DataFrame) -> pd.Series[bool]:
    """Which rows of a table of heads are of the first third of the layers, rounded up."""
    return heads["layer"] < (heads["layer"].max() + 1) / 3


def in_last_third(heads: pd.DataFrame) -> pd.Series[bool]:
    """Which rows of a table of heads are of as many layers at the end."""
    return heads["layer"] >= 2 * (heads["layer"].max() + 1) // 3


def more_than_nothing(differences: pd.Series[float]) -> tuple[str, bool | None]:
    """Mean of some differences with its 95 % confidence interval in words, and whether it is above 0; None if that is not
    told by the interval.
    """
    moments = RunningStats.from_samples(differences.to_numpy())
    mean, interval = float(moments.mean), float(moments.confidence())
    if np.isnan(interval):
        return f"{mean:.3f}", None
    return f"{mean:.3f} ± {interval:.3f}", None if abs(mean) <= interval else mean > 0


def keep(
    name: str,
    figure: Axes | Figure,
    table: pd.DataFrame,
    finding: Finding,
    provenance: Mapping[str, Any],
    folder: Path,
    formats: Sequence[str],
    *others: Path,
) -> list[Path]:
    """Writes `name.png` (and other formats), the numbers as `name.csv`, and `name.json`: the finding and what it came of.

    Args:
        name: Of the study.
        figure: The picture, or axes of it.
        table: Its numbers, one row an observation.
        finding: What it shows.
        provenance: Model, weights, images and versions, as `AttentionRun.provenance` gives them, or several such by name.
        folder: Where to write; it exists.
        formats: Of the picture.
        others: Further files that the study has written.
    """
    picture = figure if isinstance(figure, Figure) else root_figure(figure)
    verdict = {"as_published": finding.holds, "published": finding.lines()}
    content = {"finding": finding.text} | verdict | {"provenance": dict(provenance)}
    files = [
        *save_figure(picture, folder / name, formats),
        write_bytes(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.6g").encode()),
        write_bytes(folder / f"{name}.json", (json.dumps(content, indent=2, default=str) + "\n").encode()),
        *others,
    ]
    print(f"{finding.text} ({VERDICTS[finding.holds]})", *finding.lines(), *files, sep="\n")
    return files
