"""Splitting batches that run out of memory, and retrying."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import suppress

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vit_probe.attention.intercept import ForwardStopped
from vit_probe.attention.tiles import AttentionObserver
from vit_probe.errors import AssumptionWarning, InputError
from vit_probe.runner.protocol import Measure

__all__ = ["AdaptiveBatcher"]

# On the CPU and on MPS torch raises a plain RuntimeError, which only its message tells from others.
_OUT_OF_MEMORY = ("can't allocate memory", "MPS backend out of memory")


class AdaptiveBatcher:
    """Forward passes that shrink their batch size when they run out of memory.

    Attributes:
        max_batch_size: Largest number of images per forward pass; None until a batch has run out of memory.
    """

    def __init__(self) -> None:
        self.max_batch_size: int | None = None

    def forward(
        self,
        model: nn.Module,
        batch: Float[Tensor, "batch channel height width"],
        measures: Sequence[AttentionObserver],
    ) -> None:
        """Run the model on a batch while `measures` observe it; split this batch and later ones if memory runs out.

        A measure may define `min_batch_size`, the smallest batch that it can use. Batches become smaller than the largest
        minimum only if necessary, and never smaller than the smallest one: no measure could use them.

        Raises:
            InputError: If memory runs out for a batch that no measure allows to be smaller.
        """
        required = [getattr(measure, "min_batch_size", 1) for measure in measures] or [1]
        smallest, preferred = min(required), max(required)
        remaining = batch
        while len(remaining):
            part = remaining[: _next_batch_size(len(remaining), self.max_batch_size or len(remaining), preferred)]
            for measure in measures:
                if isinstance(measure, Measure):
                    measure.begin_batch()
            try:
                with suppress(ForwardStopped):
                    model(part)
                for measure in measures:
                    if isinstance(measure, Measure):
                        measure.end_batch()
            except RuntimeError as error:  # the base class of torch.OutOfMemoryError
                out_of_memory = isinstance(error, torch.OutOfMemoryError) or any(
                    phrase in str(error) for phrase in _OUT_OF_MEMORY
                )
                # An observer that is no Measure cannot undo what it has already counted of this batch.
                can_retry = len(part) > 1 and all(isinstance(measure, Measure) for measure in measures)
                if not out_of_memory or not can_retry:
                    raise
                if len(part) <= smallest:
                    raise InputError(
                        f"out of memory with a batch of {len(part)} images, but every measure needs at least {smallest} images "
                        "per batch; use a device with more memory, or smaller images"
                    ) from error
                for measure in measures:
                    measure.roll_back()  # type: ignore[attr-defined]
                self._shrink(len(part), preferred)
            else:
                remaining = remaining[len(part) :]

    def _shrink(self, batch_size: int, preferred: int) -> None:
        """Halve a batch size that ran out of memory, but keep it at `preferred` or more as long as that has not failed."""
        if self.max_batch_size is None:
            warnings.warn(
                f"out of memory with a batch of {batch_size} images; continuing with smaller batches",
                AssumptionWarning,
                stacklevel=5,
            )
        half = math.ceil(batch_size / 2)
        self.max_batch_size = max(half, preferred) if batch_size > preferred else half
        if self.max_batch_size < preferred <= batch_size:
            warnings.warn(
                f"out of memory with a batch of {batch_size} images; measures that need at least {preferred} images per batch "
                "do not count the smaller ones",
                AssumptionWarning,
                stacklevel=5,
            )


def _next_batch_size(remaining: int, max_batch_size: int, preferred: int) -> int:
    """Number of images in the next forward pass.

    Splits the remaining images evenly, because a small last batch may be too small for some measures; if even parts would be
    smaller than `preferred`, takes as many images as fit in memory.
    """
    parts = math.ceil(remaining / max_batch_size)
    return math.ceil(remaining / parts) if remaining // parts >= preferred else max_batch_size
