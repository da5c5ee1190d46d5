"""Comparing our model with a library's model of the same weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set every parameter to random values, none of them 0 or 1, such that outputs stay at a magnitude around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            kind = name.rpartition(".")[2]
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise if kind == "bias" else 0.8 + 0.2 * noise)
            elif name == "patch_embed.proj.weight" and hasattr(model.patch_embed, "backbone"):
                # A deep ResNet amplifies float32's rounding to 3e-4 of its output; this lets a tenth of it reach the tokens.
                parameter.copy_(0.1 * noise / parameter[0].numel() ** 0.5)
            elif kind in ("weight", "in_proj_weight"):
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.5 * noise)
    return model.eval()


def images(height: int, width: int | None = None, *, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(seed))


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == theirs.shape
    assert 0.05 < float(theirs.std()) < 20  # neither collapsed nor so large that the tolerance means nothing
    difference = float((ours - theirs).abs().max())
    print(f"largest difference {difference:.1e}")
    assert difference < tolerance
