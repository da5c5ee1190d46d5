"""Make model libraries importable with a CPU-only torch."""

from __future__ import annotations

from importlib import import_module

import torch

__all__ = ["define_torchvision_operators"]

_OPERATORS: list[torch.library.Library] = []  # kept alive, because a library's operators disappear with it


def define_torchvision_operators() -> None:
    """Make torchvision, and timm, which imports it, importable if its compiled operators do not load.

    With a CPU build of torch and a CUDA build of torchvision, the import fails with "operator torchvision::nms does not exist".
    Signatures of the operators are enough, because nothing here calls them.
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
