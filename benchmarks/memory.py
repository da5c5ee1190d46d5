"""Peak memory of one method in a process of its own: `python -m benchmarks.memory` reads the method from standard input."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.cases import Case
from benchmarks.methods import METHODS
from benchmarks.models import Setting

__all__ = ["Peak", "available_bytes", "peak_in_fresh_process"]

_ROOT = Path(__file__).parents[1]
_STATUS = Path("/proc/self/status")
# glibc returns large blocks to the system at once. Otherwise it keeps them, and the peak varies by a third between runs.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(256 << 10)}
_BATCHES = 2  # enough to show that a method holds more than one at a time


@dataclass(frozen=True)
class Peak:
    """Peak memory of a run above the loaded model and its images.

    Args:
        size: Size in bytes; None if the process failed.
        note: A remark on the number, or the reason why there is none.
    """

    size: int | None
    note: str = ""


def peak_in_fresh_process(setting: Setting, name: str) -> Peak:
    """Peak memory of a method on at most two batches of a case; resident memory on a CPU, allocated memory on a GPU."""
    case = replace(setting.case, images=min(setting.case.images, _BATCHES * setting.case.batch_size), left_out={})
    request = {
        "case": asdict(case),
        "method": name,
        "device": str(setting.device),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path} | _MALLOC,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Peak(None, f"no memory: the process ended with {done.returncode} ({last})")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def available_bytes(device: torch.device) -> int | None:
    """Memory that is available to a method; None if it is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if found:
            limits = [int(found[1]) * 1024]
            with suppress(OSError, ValueError):  # "max" where there is no limit
                limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
            return min(limits)
    return None


def _main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    setting = Setting(Case(**request["case"]), torch.device(request["device"]), getattr(torch, request["dtype"]))
    peak = _peak(setting, request["method"])
    print(json.dumps(asdict(peak)))


def _peak(setting: Setting, name: str) -> Peak:
    run = METHODS[name].prepare(setting)
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.synchronize(setting.device)
        torch.cuda.reset_peak_memory_stats(setting.device)
        before = torch.cuda.memory_allocated(setting.device)
        run(setting.batches)
        return Peak(torch.cuda.max_memory_allocated(setting.device) - before)
    if not _STATUS.exists():
        return Peak(None, "no memory: only Linux reports it")
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # kept free pages would hide memory that the run takes
    note = ""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        note = "memory includes the peak of loading"
    before = _status("VmRSS")
    run(setting.batches)
    return Peak(max(0, _status("VmHWM") - before), note)


def _status(field: str) -> int:
    """A field of the process's status, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{_STATUS} has no {field}")
    return int(found[1]) * 1024


if __name__ == "__main__":
    _main()
