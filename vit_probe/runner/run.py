"""Taking images through a model while measures watch its attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vit_probe.attention.hooks import attention_hooks
from vit_probe.attention.intercept import evaluated
from vit_probe.attention.tiles import AttentionObserver
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.data.stream import Images, ImageStream
from vit_probe.errors import InputError
from vit_probe.results import software_versions, weights_sha256
from vit_probe.runner.auto_batch import AdaptiveBatcher
from vit_probe.runner.distributed import Processes
from vit_probe.runner.protocol import Measure, PerImage
from vit_probe.runner.resume import RunState, differing, read_state, write_state
from vit_probe.tokens.grid import TokenGrid, first_parameter
from vit_probe.tokens.hidden_states import TokenObserver, token_hooks
from vit_probe.tokens.locate import locate_tokens

__all__ = ["AttentionRun", "model_config", "model_provenance", "select_device"]


class AttentionRun:
    """One pass of images through a model, in evaluation mode, for any number of measures.

    Args:
        model: Any Vision Transformer whose attention goes through `scaled_dot_product_attention`.
        images: See `vit_probe.data.stream.Images`.
        grid: Where the patches lie; read from the model if None.
        preprocessing: How photographs are prepared; the model's own if None.
        batch_size: Images a forward pass.
        device: `auto` leaves a model where it is unless that is the CPU, and then takes CUDA or MPS where there is one;
            or a device of torch. The model is moved back afterwards.
        keep_images: How many photographs to keep for display; see `ImageStream.kept`.
        on_error: What becomes of a photograph that cannot be read: `stop` raises, `skip` leaves it out and lists it.
        processes: Those that share the images; all of them must make a run of the same model and images.

    Attributes:
        layers, skipped, windows: See `vit_probe.tokens.locate.TokenLayout`.

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
        on_error: Literal["stop", "skip"] = "stop",
        processes: Processes | None = None,
    ) -> None:
        self.model = model
        self.processes = processes or Processes()
        self._home = first_parameter(model).device
        stays = device == "auto" and self._home.type != "cpu"
        self.device = self._home if stays else select_device(self.processes.device(device))
        preprocessing = preprocessing or getattr(model, "preprocessing", None)
        shard = (self.processes.rank, self.processes.count)
        self.images = ImageStream(
            images, preprocessing, batch_size=batch_size, keep=keep_images, on_error=on_error, shard=shard
        )
        with self._on_device():
            found = locate_tokens(model, *self.images.image_size, grid=grid)
        self._found = found
        self._batcher = AdaptiveBatcher()
        self.grid, self.windows, self.layers, self.skipped = found.grid, found.windows, found.layers, found.skipped

    def observe(
        self,
        *measures: AttentionObserver,
        progress: Callable[[int], None] | None = None,
        state: Path | None = None,
        every: int = 20,
    ) -> None:
        """Shows `measures` the attention of every layer on every image; `progress` is told the images of each batch.

        Measures with `update_tokens` (see `vit_probe.tokens.hidden_states.TokenObserver`) are shown the patch tokens that each block passes
        on, in the same forward pass. It ends after the last layer's attention, or after the last block where there are such
        measures. A batch that memory does not hold is halved, and so are those after it, though not below what every measure
        needs. Each of several processes shows its share of the images; then `measures` and `images` of the first have those of
        all, in the order of the whole list, and the others go on as soon as it has them.

        Args:
            measures: Observers for `attention_hooks`; with `state` or in several processes, measures of this package, and in
                several that have seen nothing yet.
            progress: Called after each batch; with what was done before, where the run goes on.
            state: A file that keeps how far the run has come, for each process its own. Where it is there already, the run goes
                on from it, and ends with the numbers of a run that was never interrupted.
            every: Batches after which the state is written.

        Raises:
            InputError: If a measure cannot use the attention, the images are not as they were announced, the blocks of the
                model do not show their tokens, memory does not hold as many images as all measures need, or the state is of
                another run.
            ProcessGone: If another process has ended. What this one has done is in `state`, where that was given.
        """
        several = self.processes.count > 1
        kept = [measure for measure in measures if isinstance(measure, Measure)] if several or state is not None else []
        if (several or state is not None) and len(kept) < len(measures):
            raise InputError(
                "a run with observers that cannot be kept (see vit_probe.runner.protocol.Measure) has no state, and is in one process"
            )
        identity = self._identity(kept) if several or state is not None else {}
        fresh = [deepcopy(measure) for measure in kept] if several else []

        def keep() -> None:
            if state is not None:
                done = [measure.state() for measure in kept]
                write_state(state, identity, RunState(self.images.state(), done, self._batcher.max_batch_size))

        self._check_alike(identity)
        with self.processes.barrier():
            found = None if state is None else read_state(state, identity)
        if found is not None:
            self.images.resume(found.images)
            self._batcher.max_batch_size = found.max_batch_size
            for measure, values in zip(kept, found.measures, strict=True):
                measure.restore(values)
            if progress is not None:
                progress(len(found.images["names"]))
        dtype = first_parameter(self.model).dtype
        of_tokens = [measure for measure in measures if isinstance(measure, TokenObserver)]
        with (
            self._on_device(),
            evaluated(self.model),
            attention_hooks(self.model, *measures) as hooks,
            token_hooks(self.model, self._found, of_tokens),
        ):
            hooks.stop_after = None if of_tokens else len(self.layers) - 1
            for number, batch in enumerate(self.images, start=1):
                self._batcher.forward(self.model, batch.to(self.device, dtype), measures)
                if hooks.layers != self.layers or not hooks.skipped.keys() <= self.skipped.keys():
                    raise InputError(
                        f"{type(self.model).__name__} attends otherwise in this batch than before: its layers were "
                        f"{self.layers}, now they are {hooks.layers}, and {hooks.skipped} were passed by"
                    )
                if progress is not None:
                    progress(len(batch))
                if number % every == 0:
                    keep()
        keep()
        if several:
            self._gather(kept, fresh)

    def _gather(self, measures: Sequence[Measure], fresh: Sequence[Measure]) -> None:
        """Adds what the other processes have to what the first has, in the order of the whole list."""
        with self.processes.barrier():
            found = self.processes.gather((self.images.record(), [measure.state() for measure in measures]))
            if not self.processes.is_main:
                return
            for _, states in found[1:]:
                for measure, other, state in zip(measures, fresh, states, strict=True):
                    other.restore(state)
                    measure.merge(other)
            order = self.images.merge([record for record, _ in found])
            for measure in measures:
                if isinstance(measure, PerImage):
                    measure.reorder(order)

    def _check_alike(self, identity: dict[str, Any]) -> None:
        """Raises InputError in all processes unless they have the same model, images and options."""
        identity = identity | {"on_error": self.images.on_error}  # with another, a run may go on
        with self.processes.barrier():
            for rank, other in enumerate(self.processes.gather(identity)):
                if names := differing(identity, other | {"process": 0}):
                    raise InputError(
                        f"process {rank} does not have the same {names} as process 0; start all with the same model, "
                        "images and options"
                    )

    def _identity(self, measures: Sequence[Measure]) -> dict[str, Any]:
        """What a state must be of to be gone on with."""
        config = self._model_provenance["config"]
        return {
            "model": {
                "weights": self._model_provenance["weights_sha256"],
                "config": config if isinstance(config, dict) else None,  # all else may print as an address
            },
            "images": self.images.identity(),
            "preprocessing": asdict(self.images.preprocessing) if self.images.preprocessing else None,
            "grid": asdict(self.grid),
            "batch size": self.images.batch_size,
            "measures": [[type(measure).__name__, measure.options] for measure in measures],
            "number of processes": self.processes.count,
            "process": self.processes.rank,
        }

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Has the model on the run's device, and at the end where it was."""
        try:
            if self.device != self._home:
                self.model.to(self.device)
            with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
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


def model_config(model: nn.Module) -> Any:
    """The model's configuration, by name where it is a dataclass or transformers' own; None if it has none."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):  # transformers
        config = config.to_dict()
    return asdict(config) if is_dataclass(config) and not isinstance(config, type) else config


def model_provenance(model: nn.Module) -> dict[str, Any]:
    """Name, class, configuration and hash of the weights."""
    return {
        "name": getattr(model, "name", type(model).__name__),
        "class": type(model).__name__,
        "config": model_config(model),
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
