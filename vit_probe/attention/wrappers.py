"""What torch changes about models for training and for speed: wrappers around them, and quantised layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

__all__ = ["full_precision", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside `DistributedDataParallel`, `DataParallel`, `AveragedModel` and `torch.compile`, however nested.

    These compute what the model inside does, but have none of its attributes: its configuration, its image size, its name.
    Other modules are returned as they are, since a wrapper of the user's own may do more than call the model.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> unwrap(nn.DataParallel(model)) is model
        True
        >>> unwrap(model) is model
        True
    """
    while True:
        if isinstance(model, DistributedDataParallel | nn.DataParallel | AveragedModel):
            model = model.module
        elif isinstance(inner := dict(model.named_children()).get("_orig_mod"), nn.Module):  # torch.compile
            model = inner
        else:
            return model


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Let a model compute without rounding its inputs inside the context, so that small changes of an image show.

    Dynamically quantised linear layers multiply their weights in floating point: they round their input to steps of its range
    over all images and tokens, so that each output depends a little on all of them. And GPUs do not use TF32, which keeps three
    digits of a number.

    Examples:
        >>> model, x = nn.Sequential(nn.Linear(2, 2)), torch.rand(3, 2)
        >>> with full_precision(model):
        ...     y = model(x)
        >>> torch.equal(y, model(x))  # no layer of this model is quantised
        True
    """
    quantised: list[Any] = [module for module in model.modules() if ".quantized.dynamic." in type(module).__module__]
    layers = [module for module in quantised if hasattr(module, "in_features")]
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    owners, name, full = [cudnn, matmul], "allow_tf32", False
    if hasattr(matmul, "fp32_precision"):  # from torch 2.9 on
        owners, name, full = [cudnn.conv, matmul], "fp32_precision", "ieee"  # type: ignore[assignment]
    before = [getattr(owner, name) for owner in owners]
    try:
        for owner in owners:
            setattr(owner, name, full)
        for layer in layers:
            layer.forward = partial(F.linear, weight=layer.weight().dequantize(), bias=layer.bias())
        yield
    finally:
        for layer in layers:
            del layer.forward
        for owner, earlier in zip(owners, before, strict=True):
            setattr(owner, name, earlier)
