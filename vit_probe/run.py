"""Taking images through a model while measures watch its attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from vit_probe.errors import InputError
from vit_probe.geometry import TokenGrid, first_parameter
from vit_probe.hooks import attention_hooks
from vit_probe.images import Preprocessing
from vit_probe.results import software_versions, weights_sha256
from vit_probe.routing import ForwardStopped, evaluated
from vit_probe.stream import Images, ImageStream
from vit_probe.survey import survey
from vit_probe.tiles import AttentionObserver

__all__ = ["AttentionRun", "model_provenance", "select_device"]


class AttentionRun:
    """One pass of images through a model, in evaluation mode, for any number of measures.

    Args:
        model: Any Vision Transformer whose attention goes through `scaled_dot_product_attention`.
        images: See `vit_probe.stream.Images`.
        grid: Where the patches lie; read from the model if None.
        preprocessing: How photographs are prepared; the model's own if None.
        batch_size: Images a forward pass.
        device: `auto` leaves a model where it is unless that is the CPU, and then takes CUDA or MPS where there is one;
            or a device of torch. The model is moved back afterwards.
        keep_images: How many photographs to keep for display; see `ImageStream.kept`.

    Attributes:
        layers, skipped, windows: See `vit_probe.survey.Survey`.

    Raises:
        InputError: If the images cannot be used, or it cannot be told where the model's tokens lie.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        *,
        grid: TokenGrid | None = None,
        preprocessing: Preprocessing | None = None,
        batch_size: int = 16,
        device: str = "auto",
        keep_images: int = 0,
    ) -> None:
        self.model = model
        self._home = first_parameter(model).device
        self.device = self._home if device == "auto" and self._home.type != "cpu" else select_device(device)
        preprocessing = preprocessing or getattr(model, "preprocessing", None)
        self.images = ImageStream(images, preprocessing, batch_size=batch_size, keep=keep_images)
        with self._on_device():
            found = survey(model, *self.images.image_size, grid=grid)
        self.grid, self.windows, self.layers, self.skipped = found.grid, found.windows, found.layers, found.skipped

    def observe(self, *measures: AttentionObserver, progress: Callable[[int], None] | None = None) -> None:
        """Shows `measures` the attention of every layer on every image; `progress` is told the images of each batch.

        Each forward pass ends after the last layer's attention.

        Raises:
            InputError: If a measure cannot use the attention, or the images are not as they were announced.
        """
        dtype = first_parameter(self.model).dtype
        with self._on_device(), evaluated(self.model), attention_hooks(self.model, *measures) as hooks:
            hooks.stop_after = len(self.layers) - 1
            for batch in self.images:
                with suppress(ForwardStopped):
                    self.model(batch.to(self.device, dtype))
                if progress is not None:
                    progress(len(batch))
                if hooks.layers != self.layers or not hooks.skipped.keys() <= self.skipped.keys():
                    raise InputError(
                        f"{type(self.model).__name__} attends otherwise in this batch than before: its layers were "
                        f"{self.layers}, now they are {hooks.layers}, and {hooks.skipped} were passed by"
                    )

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Has the model on the run's device, and at the end where it was."""
        try:
            if self.device != self._home:
                self.model.to(self.device)
            yield
        finally:
            if self.device != self._home:
                self.model.to(self._home)

    def provenance(self, options: dict[str, Any]) -> dict[str, Any]:
        """Where the numbers of a measure with these options come from: model, weights, images, grid, layers, versions."""
        return {
            "model": self._model_provenance,
            "images": self.images.provenance(),
            "preprocessing": asdict(self.images.preprocessing) if self.images.preprocessing else None,
            "grid": asdict(self.grid),
            "windows": {layer: list(windows.patches.shape) for layer, windows in self.windows.items()},
            "layers": self.layers,
            "skipped": self.skipped,
            "options": options,
            "versions": software_versions(),
        }

    @cached_property
    def _model_provenance(self) -> dict[str, Any]:
        return model_provenance(self.model)


def model_provenance(model: nn.Module) -> dict[str, Any]:
    """Name, class, configuration and hash of the weights."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):  # transformers
        config = config.to_dict()
    return {
        "name": getattr(model, "name", type(model).__name__),
        "class": type(model).__name__,
        "config": asdict(config) if is_dataclass(config) and not isinstance(config, type) else config,
        "weights_sha256": weights_sha256(model),
    }


def select_device(name: str) -> torch.device:
    """The device called `name`; `auto` is CUDA, else MPS, else the CPU.

    Raises:
        InputError: If there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"no device {name!r} can be used here ({reason}); choose auto, cpu, cuda or mps") from None
    return device
