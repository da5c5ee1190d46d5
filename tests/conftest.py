"""What every test needs: model libraries that import on a CPU-only torch, and no more threads than cores."""

from __future__ import annotations

import os

import torch

from benchmarks.operators import define_torchvision_operators

define_torchvision_operators()
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# One thread a process where pytest-xdist runs several, else two: more only wait for each other.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))
