"""Timing methods in turns, after their numbers have been found to agree."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.methods import METHODS
from benchmarks.models import Setting
from benchmarks.ours import reference
from benchmarks.runs import Numbers, Run

__all__ = ["Timing", "check_agreement", "take_turns"]

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Timing:
    """Times of a method divided by those of its floor in the same repeat.

    Args:
        cpu: Ratio of the CPU time of all threads, one per repeat.
        wall: Ratio of the elapsed time, one per repeat.
    """

    cpu: np.ndarray
    wall: np.ndarray


def take_turns(setting: Setting, names: list[str], repeats: int, report: Callable[[str], None]) -> dict[str, Timing]:
    """Run the methods once to compare their numbers, then `repeats` times, each time starting with another method.

    In each repeat all methods take the same batch, the next one of the case.

    Args:
        setting: Models and images.
        names: Names of the methods, including the floors of all of them.
        repeats: Timed rounds.
        report: Called with a line of text after each step.

    Raises:
        RuntimeError: If the numbers of a method differ from vit_probe's.
    """
    runs = {name: METHODS[name].prepare(setting) for name in names}
    expected = reference(setting, setting.batches[:1], rollout=any(METHODS[name].rollout for name in names))
    for name, run in runs.items():
        difference = check_agreement(name, run(setting.batches[:1]), expected, _TOLERANCE[setting.dtype])
        report(f"{name} agrees, within {difference:.0e}")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for repeat in range(repeats):
        first = repeat % len(names)
        batch = setting.batches[repeat % len(setting.batches)]
        for name in names[first:] + names[:first]:
            seconds[name].append(_seconds(runs[name], batch, setting.device))
        report(f"repeat {repeat + 1} of {repeats}")
    times = {name: np.array(pairs) for name, pairs in seconds.items()}
    ratios = {name: times[name] / times[METHODS[name].floor] for name in names}
    return {name: Timing(cpu=ratio[:, 0], wall=ratio[:, 1]) for name, ratio in ratios.items()}


def check_agreement(name: str, numbers: Numbers, expected: Mapping[str, np.ndarray], tolerance: float) -> float:
    """The largest relative difference between a method's numbers and vit_probe's.

    For the model's output, it is the norm of the difference. For distances and rollouts, it is that of the worst entry,
    relative to the entry or to a hundredth of the largest one, whichever is larger.

    Raises:
        RuntimeError: If it exceeds `tolerance`, or the method returned no numbers or numbers of another shape.
    """
    if not numbers:
        raise RuntimeError(f"{name} returned no numbers")
    differences = []
    for number, values in numbers.items():
        ours = expected[number]
        if values.shape != ours.shape:
            raise RuntimeError(
                f"{name}: {number} has shape {values.shape}, vit_probe's {ours.shape}; it measures something else"
            )
        if number == "output":
            difference = float(np.linalg.norm(values - ours) / np.linalg.norm(ours))
        else:
            size = np.abs(ours)
            difference = float((np.abs(values - ours) / np.maximum(size, size.max() / 100)).max())
        if not difference <= tolerance:
            raise RuntimeError(
                f"{name}: {number} differs from vit_probe's by a relative {difference:.1e}, more than {tolerance:.0e}; "
                "it measures something else"
            )
        differences.append(difference)
    return max(differences)


def _seconds(run: Run, batch: Tensor, device: torch.device) -> tuple[float, float]:
    """CPU time of all threads, and elapsed time."""
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run([batch])
    _wait(device)
    return time.process_time() - cpu, time.perf_counter() - wall


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
