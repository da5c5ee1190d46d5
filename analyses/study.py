"""What the studies share: which heads count as local or early, the statement of a finding, and writing the files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_probe.atomic_io import write_bytes
from vit_probe.cli.study import StudyOptions, WeightsStudyOptions, file_formats, root_figure
from vit_probe.measures.base.running_stats import RunningStats
from vit_probe.plots import save_figure

__all__ = [
    "VERDICTS",
    "Finding",
    "are_local",
    "in_first_third",
    "in_last_third",
    "keep",
    "mean_difference",
    "merged_provenance",
]

VERDICTS = {True: "as published", False: "not as published", None: "undecided"}
_ANSWERS = {True: "yes", False: "no", None: "open"}


@dataclass(frozen=True)
class Finding:
    """What a study found.

    Args:
        text: One to three sentences, with their numbers.
        published: Each published statement in a few words, and whether it holds here; None where that stays open, because it
            was not tested or the data do not decide it.
    """

    text: str
    published: Mapping[str, bool | None]

    @property
    def holds(self) -> bool | None:
        """Whether all published statements hold here; None if that stays open."""
        answers = set(self.published.values())
        return False if False in answers else None if None in answers else True

    def lines(self) -> list[str]:
        """One line per published statement."""
        return [f"{_ANSWERS[holds]}: {statement}" for statement, holds in self.published.items()]


def are_local(heads: pd.DataFrame) -> pd.Series[bool]:
    """Which rows of a table of attention distances belong to local heads: less than half the distance of uniform attention."""
    return heads["distance"] < heads["uniform_distance"] / 2


def in_first_third(heads: pd.DataFrame) -> pd.Series[bool]:
    """Which rows of a table of heads belong to the first third of the layers, rounded up."""
    return heads["layer"] < (heads["layer"].max() + 1) / 3


def in_last_third(heads: pd.DataFrame) -> pd.Series[bool]:
    """Which rows of a table of heads belong to the last third of the layers, rounded up."""
    return heads["layer"] >= 2 * (heads["layer"].max() + 1) // 3


def mean_difference(differences: pd.Series[float]) -> tuple[str, bool | None]:
    """The mean of some differences with its 95 % confidence interval, as text, and whether the mean is above 0.

    The answer is None if the interval contains 0, or if there are too few differences for an interval.
    """
    stats = RunningStats.from_samples(differences.to_numpy())
    mean, interval = float(stats.mean), float(stats.confidence())
    if np.isnan(interval):
        return f"{mean:.3f}", None
    return f"{mean:.3f} ± {interval:.3f}", None if abs(mean) <= interval else mean > 0


def merged_provenance(*provenances: Mapping[str, Any]) -> dict[str, Any]:
    """One provenance for several results of the same pass, with the options of all of them."""
    options = {name: value for one in provenances for name, value in one["options"].items()}
    return dict(provenances[0]) | {"options": options}


def keep(
    name: str,
    figure: Axes | Figure,
    table: pd.DataFrame,
    finding: Finding,
    provenance: Mapping[str, Any],
    options: StudyOptions | WeightsStudyOptions,
    *others: Path,
) -> list[Path]:
    """Write `name.png` (or other formats), the numbers as `name.csv`, and `name.json`: the finding and its provenance.

    Args:
        name: Name of the study.
        figure: The picture, or axes of it.
        table: Its numbers, one row per observation.
        finding: What it shows.
        provenance: Model, weights, images and versions, as in `Result.provenance`, or several such by name.
        options: Options of the study, with the folder and the formats.
        others: Further files that the study has written.
    """
    picture = figure if isinstance(figure, Figure) else root_figure(figure)
    folder = options.out
    verdict = {"as_published": finding.holds, "published": finding.lines()}
    content = {"finding": finding.text} | verdict | {"provenance": dict(provenance)}
    files = [
        *save_figure(picture, folder / name, file_formats(options.format)),
        write_bytes(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.6g").encode()),
        write_bytes(folder / f"{name}.json", (json.dumps(content, indent=2, default=str) + "\n").encode()),
        *others,
    ]
    print(f"{finding.text} ({VERDICTS[finding.holds]})", *finding.lines(), *files, sep="\n")
    return files
