"""Writing analyses into a folder: their pictures, their numbers as CSV, and the results themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_probe.atomic_io import write_bytes
from vit_probe.measures import AttentionDistanceResult, PatchFiltersResult, PositionSimilarityResult
from vit_probe.plots import plot_figure7, save_figure
from vit_probe.plots.position_similarity import shown_patches
from vit_probe.results import Result

__all__ = ["root_figure", "write_analysis", "write_figure7", "write_run"]


def write_analysis(
    result: Result, axes: Axes, folder: Path, name: str, formats: Sequence[str], *, table: pd.DataFrame | None = None
) -> list[Path]:
    """Writes `name.png` (and other formats), `name.csv` and `name.safetensors`, the result with its provenance.

    The CSV holds the result's own table, or the one that is given in its place.
    """
    if table is not None:
        frame = table
    elif isinstance(result, PositionSimilarityResult):  # all pairs of a large grid are millions of rows: those of the picture
        frame = result.to_dataframe(*(shown_patches(size).tolist() for size in result.similarity.shape[:2]))
    else:
        frame = result.to_dataframe()
    numbers = frame.to_csv(index=False, float_format="%.8g").encode()
    return [
        *save_figure(root_figure(axes), folder / name, formats),
        write_bytes(folder / f"{name}.csv", numbers),
        result.save(folder / f"{name}.safetensors"),
    ]


def write_figure7(
    filters: PatchFiltersResult,
    similarity: PositionSimilarityResult | None,
    distance: AttentionDistanceResult,
    folder: Path,
    formats: Sequence[str],
) -> list[Path]:
    """Writes the three-panel sheet of the ViT paper's figure 7 as `figure7.png` (and other formats)."""
    if similarity is None:
        sheet = plot_figure7(filters.filters, None, distance.to_dataframe())
    else:
        title = similarity.title
        sheet = plot_figure7(filters.filters, similarity.similarity, distance.to_dataframe(), similarity_title=title)
    return save_figure(sheet, folder / "figure7", formats)


def write_run(provenance: dict[str, Any], files: Sequence[Path], folder: Path) -> Path:
    """Writes `run.json`: what was run on what, and which files came of it."""
    content = provenance | {"files": sorted(path.name for path in files)}
    return write_bytes(folder / "run.json", (json.dumps(content, indent=2, default=str) + "\n").encode())


def root_figure(axes: Axes) -> Figure:
    """The whole figure that the axes are part of."""
    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError("these axes belong to no figure")
    return figure
