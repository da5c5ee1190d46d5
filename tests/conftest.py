"""What every test needs: model libraries that import on a CPU-only torch, and no more threads than cores."""

from __future__ import annotations

import os

import torch


def _define_torchvision_operators() -> list[torch.library.Library]:
    """Makes torchvision (and timm, which imports it) importable where its compiled operators do not load.

    On a CPU-only torch the import of a torchvision that is built for CUDA fails with "operator torchvision::nms
    does not exist". The operators' signatures are enough: nothing here calls them.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "nms" not in str(error):
            raise
    except ImportError:
        return []
    else:
        return []
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return [library]


_LIBRARIES = _define_torchvision_operators()  # kept alive: dropping one takes its operators away
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# One thread a process where pytest-xdist runs several, else two: more only wait for each other.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))
