"""Writing results into a folder: their pictures, their numbers as CSV, and the results themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_probe.atomic_io import write_bytes
from vit_probe.plots import plot_figure7, save_figure
from vit_probe.results import Result

__all__ = ["root_figure", "write_figure7", "write_result", "write_run"]


def write_result(result: Result, draw: Callable[[], Axes], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write `NAME.safetensors`, the result with its provenance, `NAME.csv` and `NAME.png` (or other formats).

    The picture comes last, so that nothing that was computed is lost if it cannot be drawn.
    """
    name = result.measure
    files = [result.save(folder / f"{name}.safetensors"), _write_csv(result.csv_table(), folder / f"{name}.csv")]
    if getattr(result, "per_image", None):
        files.append(_write_csv(result.to_dataframe(per_image=True), folder / f"{name}_per_image.csv"))  # type: ignore[call-arg]
    return [*save_figure(root_figure(draw()), folder / name, formats), *files]


def _write_csv(frame: pd.DataFrame, path: Path) -> Path:
    return write_bytes(path, frame.to_csv(index=False, float_format="%.8g").encode(errors="backslashreplace"))


def write_figure7(filters: Any, similarity: Any | None, distance: Result, folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write the three-panel sheet of the ViT paper's figure 7 as `figure7.png` (or other formats).

    Args:
        filters: The result of `patch_filters`.
        similarity: The result of `position_similarity`; None where the model has no positions to compare.
        distance: The result of `mean_attention_distance`.
        folder: Where to write.
        formats: Of the picture.
    """
    positions = None if similarity is None else similarity.similarity
    title = {} if similarity is None else {"similarity_title": similarity.title}
    sheet = plot_figure7(filters.filters, positions, distance.to_dataframe(), **title)
    return save_figure(sheet, folder / "figure7", formats)


def write_run(provenance: dict[str, Any], files: Sequence[Path], folder: Path) -> Path:
    """Write `run.json`: what was run on what, and which files were written."""
    content = provenance | {"files": sorted(path.name for path in files)}
    return write_bytes(folder / "run.json", (json.dumps(content, indent=2, default=str) + "\n").encode())


def root_figure(axes: Axes) -> Figure:
    """The whole figure that the axes are part of."""
    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError("these axes belong to no figure")
    return figure
