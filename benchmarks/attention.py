"""Mean attention distance and class-token rollout, computed by vit_probe and by other libraries.

    python -m benchmarks.attention --case base-196 --case small-4096 --repeats 8 --out benchmarks/results

All methods use the same random weights and the same images, and no method is timed before its numbers agree with vit_probe's.
Then they take turns, and each is compared with the plain fused forward pass of its own library's model in the same repeat. Peak
memory is measured in a fresh process for each method. OUT receives `DEVICE-DATE.csv` and `.md`, which are rewritten after each
case; they keep the results for other cases of an earlier run on the same day.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.cases import CASES, Case, quick
from benchmarks.measuring import take_turns
from benchmarks.memory import available_bytes, peak_in_fresh_process
from benchmarks.methods import METHODS, with_floors
from benchmarks.models import Setting
from benchmarks.report import Row, header, make_row, read_other_cases, write_tables
from vit_probe import InputError
from vit_probe.atomic_io import writable_folder
from vit_probe.cli.study import run_study
from vit_probe.runner.run import select_device

__all__ = ["benchmark", "main"]

_QUICK_REPEATS = 2
_USABLE = 0.85  # of the available memory


class Dtype(StrEnum):
    """Type of weights and images."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def main(
    case: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(CASES)}; may be repeated. Default: all.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Method to compare; may be repeated. Default: all.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds, after one that is not timed.")] = 8,
    quick_: Annotated[bool, typer.Option("--quick", help="Few images, two repeats and no large case, to try it out.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Type of weights and images.")] = Dtype.float32,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch. Default: its own choice.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("benchmarks/results"),
) -> None:
    """Measure attention with vit_probe and with other libraries, and write tables of ratios."""
    _check_known(case or (), CASES, "case")
    _check_known(method or (), METHODS, "method")
    chosen = [CASES[name] for name in dict.fromkeys(case or CASES)]
    if quick_:
        chosen = [small for small in map(quick, chosen) if small is not None]
        repeats = min(repeats, _QUICK_REPEATS)
    if threads is not None:
        torch.set_num_threads(threads)
    suffix = "-quick" if quick_ else ""
    where, kind = select_device(device), getattr(torch, dtype)
    for path in benchmark(chosen, method or None, device=where, dtype=kind, repeats=repeats, out=out, suffix=suffix):
        print(path)


def benchmark(
    cases: Sequence[Case],
    methods: Sequence[str] | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    out: Path,
    suffix: str = "",
) -> list[Path]:
    """Measure one case after the other, and write the tables after each.

    Args:
        cases: Models and images to measure.
        methods: Names of methods, which are run even if a case leaves them out; None for all methods that it does not.
        device: Where to run.
        dtype: Type of weights and images.
        repeats: Timed rounds.
        out: Folder for the tables.
        suffix: Suffix of the files' names.

    Raises:
        RuntimeError: If the numbers of a method differ from vit_probe's.
        InputError: If the folder cannot be written, or there is no case.
    """
    if not cases:
        raise InputError("no case is left; pass a smaller one, or leave out --quick")
    kind = "" if dtype == torch.float32 else f"-{str(dtype).removeprefix('torch.')}"
    stem = writable_folder(out) / f"{device.type}{kind}-{date.today().isoformat()}{suffix}"
    titles = {case.name: case.title() for case in (*CASES.values(), *cases)}
    rows = read_other_cases(stem, [case.name for case in cases])
    paths: list[Path] = []
    for case in cases:
        rows += _measure(Setting(case, device, dtype), methods, repeats)
        paths = write_tables(stem, header(device, dtype), titles, rows)
    return paths


def _measure(setting: Setting, methods: Sequence[str] | None, repeats: int) -> list[Row]:
    """The rows of a case."""
    case, started = setting.case, time.monotonic()

    def report(progress: str) -> None:
        print(f"{time.monotonic() - started:7.0f} s  {case.name}: {progress}", file=sys.stderr, flush=True)

    listed = list(METHODS) if methods is None else with_floors(methods)
    kept_out = dict(case.left_out) if methods is None else {}
    kept_out |= _too_large(setting, [name for name in listed if name not in kept_out])
    peers = [name for name in listed if name not in kept_out and METHODS[name].floor != name]
    names = with_floors(peers) if peers else [name for name in listed if name not in kept_out]
    timings = take_turns(setting, names, repeats, report)
    peaks = {}
    for name in names:
        peaks[name] = peak_in_fresh_process(setting, name)
        report(f"memory of {name} measured")
    rows = []
    for name in (name for name in listed if name in timings or name in kept_out):
        floor, notes = METHODS[name].floor, [kept_out[name]] if name in kept_out else [METHODS[name].note]
        rows.append(make_row(case, name, floor, timings.get(name), peaks.get(name), peaks.get(floor), *notes))
    return rows


def _too_large(setting: Setting, names: list[str]) -> dict[str, str]:
    """The methods whose attention maps do not fit into memory, each with a note."""
    available = available_bytes(setting.device)
    if available is None:
        return {}
    needed = {name: METHODS[name].needed_bytes(setting.case) for name in names}
    return {name: f"does not fit ({size / 1e9:.3g} GB)" for name, size in needed.items() if size > _USABLE * available}


def _check_known(names: Iterable[str], known: Iterable[str], kind: str) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"there is no {kind} {', '.join(unknown)}; choose from {', '.join(known)}")


if __name__ == "__main__":
    run_study(main)
