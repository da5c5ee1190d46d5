"""Model libraries that import on a torch for the CPU."""

from __future__ import annotations

from importlib import import_module

import torch

__all__ = ["define_torchvision_operators"]

_OPERATORS: list[torch.library.Library] = []  # kept alive: dropping one takes its operators away


def define_torchvision_operators() -> None:
    """Makes torchvision, and timm which imports it, importable where its compiled operators do not load.

    With a torch for the CPU and a torchvision for CUDA the import fails with "operator torchvision::nms does not exist". The
    operators' signatures are enough: nothing here calls them.
    """
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if "nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _OPERATORS.append(library)
    except ImportError:
        return
