"""What the studies have in common: how each keeps what it shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_probe.files import write_bytes
from vit_probe.output import root_figure
from vit_probe.plots import save_figure

__all__ = ["Finding", "are_local", "in_first_third", "in_last_third", "keep"]


@dataclass(frozen=True)
class Finding:
    """What a study found.

    Args:
        text: One to three sentences, with their numbers.
        holds: Whether it is what was published.
    """

    text: str
    holds: bool


def are_local(heads: pd.DataFrame) -> pd.Series[bool]:
    """Which rows of a table of attention distances are of heads that look near: less than half as far as uniform attention."""
    return heads["distance"] < heads["uniform_distance"] / 2


def in_first_third(heads: pd.DataFrame) -> pd.Series[bool]:
    """Which rows of a table of heads are of the first third of the layers, rounded up."""
    return heads["layer"] < (heads["layer"].max() + 1) / 3


def in_last_third(heads: pd.DataFrame) -> pd.Series[bool]:
    """Which rows of a table of heads are of as many layers at the end."""
    return heads["layer"] >= 2 * (heads["layer"].max() + 1) // 3


def keep(
    name: str,
    figure: Axes | Figure,
    table: pd.DataFrame,
    finding: Finding,
    provenance: Mapping[str, Any],
    folder: Path,
    formats: Sequence[str],
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
    """
    picture = figure if isinstance(figure, Figure) else root_figure(figure)
    content = {"finding": finding.text, "as_published": finding.holds, "provenance": dict(provenance)}
    files = [
        *save_figure(picture, folder / name, formats),
        write_bytes(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.6g").encode()),
        write_bytes(folder / f"{name}.json", (json.dumps(content, indent=2, default=str) + "\n").encode()),
    ]
    verdict = "as published" if finding.holds else "not as published"
    print(f"{finding.text} ({verdict})", *files, sep="\n")
    return files
