"""The tables: a CSV file with one row per case and method, and the same in Markdown."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.cases import Case
from benchmarks.measuring import Timing
from benchmarks.memory import Peak
from vit_probe.atomic_io import write_bytes

__all__ = ["Row", "header", "make_row", "read_other_cases", "side_by_side", "write_tables"]

_PACKAGES = ("vit-probe", "torch", "timm", "transformers", "numpy")


@dataclass(frozen=True)
class Row:
    """The results of a method. Ratios are relative to `floor`: medians over repeats, with quartiles; NaN if it was not run."""

    case: str
    method: str
    repeats: int
    cpu_ratio: float
    cpu_ratio_low: float
    cpu_ratio_high: float
    wall_ratio: float
    wall_ratio_low: float
    wall_ratio_high: float
    memory_mb: float
    memory_ratio: float
    floor: str
    note: str


def make_row(
    case: Case, method: str, floor: str, timing: Timing | None, peak: Peak | None, floor_peak: Peak | None, *notes: str
) -> Row:
    """The row of a method; `timing` and `peak` are None if it was not run."""
    nothing = np.full(3, np.nan)
    cpu, wall = (nothing, nothing) if timing is None else (_quartiles(timing.cpu), _quartiles(timing.wall))
    size = peak.size if peak else None
    floor_size = floor_peak.size if floor_peak else None
    memory_ratio = size / floor_size if size is not None and floor_size else np.nan
    return Row(
        case=case.name,
        method=method,
        repeats=0 if timing is None else len(timing.cpu),
        cpu_ratio=float(cpu[1]),
        cpu_ratio_low=float(cpu[0]),
        cpu_ratio_high=float(cpu[2]),
        wall_ratio=float(wall[1]),
        wall_ratio_low=float(wall[0]),
        wall_ratio_high=float(wall[2]),
        memory_mb=np.nan if size is None else size / 1e6,
        memory_ratio=memory_ratio,
        floor=floor,
        note="; ".join(note for note in (*notes, peak.note if peak else "") if note),
    )


def header(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Device and software versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "Date": date.today().isoformat(),
        "Device": f"{name} ({device.type})",
        "Threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "Type": str(dtype).removeprefix("torch."),
        "Versions": ", ".join([f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in _PACKAGES)]),
    }


def read_other_cases(stem: Path, cases: Iterable[str]) -> list[Row]:
    """The rows of an earlier run that belong to other cases than these."""
    path = _csv(stem)
    if not path.is_file():
        return []
    frame = pd.read_csv(path, keep_default_na=True).fillna({"note": ""})
    frame = frame[~frame["case"].isin(list(cases))]
    return [Row(**{str(name): value for name, value in record.items()}) for record in frame.to_dict("records")]


def write_tables(stem: Path, about: Mapping[str, str], titles: Mapping[str, str], rows: list[Row]) -> list[Path]:
    """Write `stem`.csv and `stem`.md, replacing older files atomically.

    Args:
        stem: Folder and name without suffix.
        about: Result of `header`.
        titles: Description of each case.
        rows: Rows of all cases so far.
    """
    columns = [field.name for field in fields(Row)]
    frame = pd.DataFrame([asdict(row) for row in rows], columns=columns).round(4)
    csv = write_bytes(_csv(stem), frame.to_csv(index=False).encode())
    parts = ["# Attention measured, side by side", "\n".join(f"- {name}: {value}" for name, value in about.items()), _LEGEND]
    parts += ["## All cases: CPU time and memory, ratios", side_by_side(rows)]
    for case in dict.fromkeys(row.case for row in rows):
        of_case = [row for row in rows if row.case == case]
        repeats = max(row.repeats for row in of_case)
        parts += [f"## {case}", f"{titles.get(case, case)}; {repeats} repeats", _table(of_case)]
    markdown = write_bytes(stem.with_name(f"{stem.name}.md"), "\n\n".join(parts).encode() + b"\n")
    return [csv, markdown]


def side_by_side(rows: Iterable[Row]) -> str:
    """A Markdown table with one line per method and one column per case: median ratio of CPU time, and ratio of memory."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        ratios = ["-" if np.isnan(ratio) else f"{ratio:.2f}" for ratio in (row.cpu_ratio, row.memory_ratio)]
        cells.setdefault(row.method, {})[row.case] = ", ".join(ratios)
    cases = list(dict.fromkeys(case for of_method in cells.values() for case in of_method))
    lines = [["method", *cases], ["---", *("---:" for _ in cases)]]
    lines += [[method, *(of_method.get(case, "") for case in cases)] for method, of_method in cells.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_LEGEND = (
    "Times are ratios to the plain fused forward pass of the same library's model on the same images (the first rows): the\n"
    "median over repeats, each compared with the forward pass of the same repeat, and the quartiles. CPU time is the sum over\n"
    "all threads. Memory is the peak above the loaded model and its images, in a fresh process, on at most two batches,\n"
    "not counting memory that was freed (MALLOC_MMAP_THRESHOLD_=262144).\n"
    "No method is timed before its numbers agree with vit_probe's."
)


def _table(rows: list[Row]) -> str:
    lines = [
        "| method | CPU time, ratio | elapsed time, ratio | peak memory | memory, ratio | |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        cpu = _ratio(row.cpu_ratio, row.cpu_ratio_low, row.cpu_ratio_high)
        wall = _ratio(row.wall_ratio, row.wall_ratio_low, row.wall_ratio_high)
        memory = "" if np.isnan(row.memory_mb) else f"{row.memory_mb:,.0f} MB"
        times = "" if np.isnan(row.memory_ratio) else f"{row.memory_ratio:.2f}"
        lines.append(f"| {row.method} | {cpu} | {wall} | {memory} | {times} | {row.note} |")
    return "\n".join(lines)


def _ratio(middle: float, low: float, high: float) -> str:
    return "" if np.isnan(middle) else f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _quartiles(ratios: np.ndarray) -> np.ndarray:
    return np.quantile(ratios, [0.25, 0.5, 0.75])


def _csv(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.csv")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
