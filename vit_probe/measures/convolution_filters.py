"""First-layer filters of a convolutional network, from a file of its weights alone."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
from torch import Tensor

from vit_probe.checkpoints.files import TENSOR_SUFFIXES, read_tensors
from vit_probe.errors import AssumptionWarning, InputError
from vit_probe.measures.patch_filters import PatchFiltersResult
from vit_probe.results import check_finite, software_versions

__all__ = ["convolution_filters"]

_COLOURS = 3


def convolution_filters(path: str | Path) -> PatchFiltersResult:
    """The filters that a convolutional network applies to the pixels of a colour image, as they are.

    The network itself is not needed: its first layer is the first parameter in the file of shape (filter, 3, row, col), of more
    than one pixel. A safetensors file keeps no order of layers, so that there it is the first by name.

    Args:
        path: A `.safetensors`, `.pt`, `.pth` or `.bin` file that holds a state dict, read without running pickled code.

    Returns:
        The filters in the file's order, `principal` False. The provenance has the hash of the file as `weights_sha256`.

    Raises:
        InputError: If there is no such file, it cannot be read, or holds no such parameter, or one that is not finite.

    References:
        Krizhevsky, Sutskever & Hinton 2012, ImageNet classification with deep convolutional neural networks, figure 3;
        compared with a ViT's in Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5.
    """
    path = Path(path).expanduser()
    if path.is_file() and path.suffix not in TENSOR_SUFFIXES:
        raise InputError(f"{path} is no file of weights that can be read; known are {', '.join(TENSOR_SUFFIXES)}")
    state = read_tensors(path)
    found = [name for name, value in state.items() if value.ndim == 4 and _sees_colours(value)]
    if not found:
        shapes = [f"{name} {tuple(value.shape)}" for name, value in state.items()][:3]
        raise InputError(
            f"{path} holds no convolution over {_COLOURS} colour channels, a parameter of shape (filter, {_COLOURS}, row, col) "
            f"of more than one pixel; its first parameters are {', '.join(shapes)}"
        )
    name = min(found) if path.suffix == ".safetensors" else found[0]
    if len(found) > 1:
        others = ", ".join(other for other in found if other != name)
        warnings.warn(f"of {path.name} the filters of {name} are taken, not those of {others}", AssumptionWarning, stacklevel=2)
    weight = state[name].detach().double().numpy()
    check_finite(weight, f"the filters {name} of {path}")
    return PatchFiltersResult(
        filters=weight,
        explained_variance_ratio=np.full(len(weight), np.nan),
        principal=False,
        provenance={
            "model": {"name": path.name, "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
            "layers": [name],
            "options": {"components": None},
            "versions": software_versions(),
        },
    )


def _sees_colours(weight: Tensor) -> bool:
    filters, channels, rows, cols = weight.shape
    return filters > 0 and channels == _COLOURS and rows * cols > 1
