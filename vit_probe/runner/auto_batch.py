"""Batches that memory does not hold, taken through a model in pieces."""

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

_FULL = ("can't allocate memory", "MPS backend out of memory")  # CPU and MPS have no error of their own


class AdaptiveBatcher:
    """Takes batches through a model whole, or in as many images at once as memory turns out to hold.

    Attributes:
        max_batch_size: So many images at most, once a batch did not fit; None before.
    """

    def __init__(self) -> None:
        self.max_batch_size: int | None = None

    def forward(
        self,
        model: nn.Module,
        batch: Float[Tensor, "image channel height width"],
        measures: Sequence[AttentionObserver],
    ) -> None:
        """Takes a batch through the model while `measures` watch; in smaller pieces, and later batches too, where it must.

        Raises:
            InputError: If memory does not hold as many images as every measure needs.
        """
        needed = [getattr(measure, "min_batch_size", 1) for measure in measures] or [1]
        min_batch_size, most = min(needed), max(needed)
        rest = batch
        while len(rest):
            part = rest[: _next(len(rest), self.max_batch_size or len(rest), most)]
            for measure in measures:
                if isinstance(measure, Measure):
                    measure.begin_batch()
            try:
                with suppress(ForwardStopped):
                    model(part)
                for measure in measures:
                    if isinstance(measure, Measure):
                        measure.end_batch()
            except RuntimeError as error:  # of which torch.OutOfMemoryError is one
                full = isinstance(error, torch.OutOfMemoryError) or any(phrase in str(error) for phrase in _FULL)
                if not full or len(part) == 1 or not all(isinstance(measure, Measure) for measure in measures):
                    raise
                if len(part) <= min_batch_size:
                    raise InputError(
                        f"memory does not hold {len(part)} images, and what is measured needs batches of {min_batch_size} or more; "
                        "choose a device with more memory, or smaller images"
                    ) from error
                for measure in measures:
                    measure.roll_back()  # type: ignore[attr-defined]
                self._shrink(len(part), most)
            else:
                rest = rest[len(part) :]

    def _shrink(self, images: int, min_batch_size: int) -> None:
        """Takes at most half as many as these, which memory does not hold, though no fewer than `min_batch_size` as long as it can."""
        if self.max_batch_size is None:
            warnings.warn(f"memory does not hold {images} images; fewer are taken at once", AssumptionWarning, stacklevel=5)
        half = math.ceil(images / 2)
        self.max_batch_size = max(half, min_batch_size) if images > min_batch_size else half
        if self.max_batch_size < min_batch_size <= images:
            warnings.warn(
                f"memory does not hold {images} images; what is measured in batches of {min_batch_size} or more cannot count these",
                AssumptionWarning,
                stacklevel=5,
            )


def _next(left: int, max_batch_size: int, min_batch_size: int) -> int:
    """How many of the images that are left to take: as many each time but for one, or, where these are too few, all that go."""
    pieces = math.ceil(left / max_batch_size)
    return math.ceil(left / pieces) if left // pieces >= min_batch_size else max_batch_size
