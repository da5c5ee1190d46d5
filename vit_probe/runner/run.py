"""One pass of images through a model, observed by any number of measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, is_dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vit_probe.attention.exclusive import exclusive_use
from vit_probe.attention.hooks import attention_hooks
from vit_probe.attention.intercept import evaluation_mode
from vit_probe.attention.tiles import AttentionObserver
from vit_probe.attention.wrappers import unwrap
from vit_probe.data.manifest import ImageManifest
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.data.stream import Images, ImageStream
from vit_probe.errors import InputError
from vit_probe.results import software_versions, weights_sha256
from vit_probe.runner.arguments import check_model_and_images, check_run_options, select_device
from vit_probe.runner.auto_batch import AdaptiveBatcher
from vit_probe.runner.distributed import ProcessGroup
from vit_probe.runner.protocol import Measure, PerImage
from vit_probe.runner.resume import RunState, differing, read_state, reading, write_state
from vit_probe.runner.saving import PeriodicSave
from vit_probe.tokens.grid import TokenGrid, first_parameter
from vit_probe.tokens.hidden_states import TokenObserver, token_hooks
from vit_probe.tokens.locate import locate_tokens

__all__ = ["AttentionRun", "model_config", "model_provenance", "select_device"]


class AttentionRun:
    """One pass of images through a model, in evaluation mode, for any number of measures.

    Args:
        model: Any Vision Transformer whose attention goes through `scaled_dot_product_attention`.
        images: See `vit_probe.data.stream.Images`.
        grid: Where the patches lie; determined from the model if None.
        preprocessing: How photographs are prepared; the model's own if None.
        batch_size: Images per forward pass.
        device: `auto` leaves a model where it is unless that is the CPU, and then takes CUDA or MPS if available; or a torch
            device. The model is moved back afterwards.
        keep_images: Number of photographs to keep for display; see `ImageStream.kept`.
        on_error: What happens with a photograph that cannot be read: `stop` raises, `skip` leaves it out and lists it.
        processes: The processes that share the images; each of them must make a run of the same model and images.

    Attributes:
        layout: What `locate_tokens` found for these images.
        grid, layers, skipped, windows: Fields of the layout.

    Raises:
        InputError: If an argument is of another type, the images cannot be used, or the positions of the model's tokens cannot
            be determined.

    Examples:
        >>> from vit_probe import load_model, mean_attention_distance
        >>> run = AttentionRun(load_model("demo"), torch.zeros(2, 3, 64, 64))
        >>> distance = mean_attention_distance.observer(run.grid, windows=run.windows)
        >>> run.observe(distance)
        >>> run.result(distance).num_images
        2
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
        processes: ProcessGroup | None = None,
    ) -> None:
        check_model_and_images(model, images)
        check_run_options(grid, preprocessing, batch_size)
        self.model = model = unwrap(model)
        self.processes = processes or ProcessGroup()
        self._home = first_parameter(model).device
        stays = device == "auto" and self._home.type != "cpu"
        self.device = self._home if stays else select_device(self.processes.device(device))
        preprocessing = preprocessing or getattr(model, "preprocessing", None)
        shard = (self.processes.rank, self.processes.world_size)
        self.images = ImageStream(
            images, preprocessing, batch_size=batch_size, keep=keep_images, on_error=on_error, shard=shard
        )
        with self._on_device():
            self.layout = locate_tokens(model, *self.images.image_size, grid=grid, channels=self.images.num_channels)
        self.grid, self.windows = self.layout.grid, self.layout.windows
        self.layers, self.skipped = self.layout.layers, self.layout.skipped
        self._batcher = AdaptiveBatcher()

    def observe(
        self,
        *measures: AttentionObserver,
        progress: Callable[[int], None] | None = None,
        state: Path | None = None,
        every: int = 20,
        every_seconds: float = 30.0,
    ) -> None:
        """Show `measures` the attention of every layer on every image.

        Measures with `update_tokens` (see `vit_probe.tokens.hidden_states.TokenObserver`) are also shown the patch tokens after
        each block, in the same forward pass, which ends after the last block then, and else after the last layer's attention. A
        batch that runs out of memory is split and retried, and later batches are smaller, but not smaller than every measure
        needs. Each of several processes shows its share of the images; then the `measures` and `images` of the main process
        hold those of all, in the order of the whole list.

        Args:
            measures: Observers for `attention_hooks`. With `state` or in several processes they must be resumable
                (`vit_probe.runner.protocol.Measure`), and in several processes they must be empty.
            progress: Called after each batch with its number of images; on resuming, first with the number already done.
            state: File that records how far the run has come, one for each process. If it exists, the run continues from it,
                and ends with the numbers of a run that was never interrupted. SIGINT (Ctrl-C) and SIGTERM wait until the batch
                has ended and the state is written; a second one does not wait.
            every: Number of batches after which the state is written.
            every_seconds: Time after which the state is written, at the end of the batch.

        Raises:
            InputError: If a measure cannot use the attention, the images differ from what was announced, the blocks of the
                model do not show their tokens, fewer images fit into memory than all measures need, or the state is of another
                run.
            ProcessExited: If another process has ended. What this one has done is in `state`, if that was given.
        """
        several = self.processes.world_size > 1
        resumable = [measure for measure in measures if isinstance(measure, Measure)] if several or state is not None else []
        if (several or state is not None) and len(resumable) < len(measures):
            raise InputError(
                "observers without a state (see vit_probe.runner.protocol.Measure) can be shown a run in one process only, and "
                "the run cannot be resumed; leave out state=, or give them one"
            )
        identity = self._identity(resumable) if several or state is not None else {}
        # Sums of other processes are read into copies of the empty measures before they are merged.
        empty = [deepcopy(measure) for measure in resumable] if several else []

        def save(path: Path) -> None:
            done = [measure.state() for measure in resumable]
            write_state(path, identity, RunState(self.images.state(), done, self._batcher.max_batch_size))

        save_state = None if state is None else partial(save, state)
        self._check_same_in_all_processes(identity)
        with self.processes.barrier():
            earlier = None if state is None else read_state(state, identity)
            if state is not None and earlier is not None:
                with reading(state):
                    self._restore(resumable, earlier)
        if earlier is not None and progress is not None:
            progress(len(earlier.images["names"]))
        dtype = first_parameter(self.model).dtype
        of_tokens = [measure for measure in measures if isinstance(measure, TokenObserver)]
        with (
            self._on_device(),
            evaluation_mode(self.model),
            attention_hooks(self.model, *measures) as hooks,
            token_hooks(self.model, self.layout, of_tokens),
            PeriodicSave(save_state, every=every, every_seconds=every_seconds) as saving,
        ):
            # Whatever follows the last layer's attention costs time and is not looked at.
            hooks.stop_after = None if of_tokens else len(self.layers) - 1
            for batch in self.images:
                with saving.batch():
                    self._batcher.forward(self.model, batch.to(self.device, dtype), measures)
                    # A model may choose its layers by its input. Sums over different layers would make one wrong table.
                    if hooks.layers != self.layers or not hooks.skipped.keys() <= self.skipped.keys():
                        raise InputError(
                            f"{type(self.model).__name__} attends differently in this batch than before: its layers were "
                            f"{self.layers}, now they are {hooks.layers}, and {hooks.skipped} were skipped"
                        )
                if progress is not None:
                    progress(len(batch))
        if several:
            self._gather(resumable, empty)

    def _restore(self, measures: Sequence[Measure], state: RunState) -> None:
        ImageManifest.from_state(state.images)  # the stream does so later
        self.images.resume(state.images)
        self._batcher.max_batch_size = state.max_batch_size
        for measure, values in zip(measures, state.measures, strict=True):
            measure.restore(values)
            if unread := measure.state().keys() ^ values.keys():
                raise KeyError(*sorted(unread))  # caught by `reading`

    def result(self, measure: Measure) -> Any:
        """The result of a measure that has observed this run, with its provenance."""
        return measure.compute(self.provenance(measure.options), names=self.images.names, images=self.images.kept())

    def _gather(self, measures: Sequence[Measure], empty: Sequence[Measure]) -> None:
        """Merge the sums of all processes into those of the main one, in the order of the whole list."""
        with self.processes.barrier():
            shares = self.processes.gather((self.images.manifest, [measure.state() for measure in measures]))
            if not self.processes.is_main:
                return
            for _, states in shares[1:]:
                for measure, other, state in zip(measures, empty, states, strict=True):
                    other.restore(state)
                    measure.merge(other)
            order = self.images.merge([manifest for manifest, _ in shares])
            for measure in measures:
                if isinstance(measure, PerImage):
                    measure.reorder(order)

    def _check_same_in_all_processes(self, identity: dict[str, Any]) -> None:
        """Raise InputError in all processes unless they have the same model, images and options."""
        identity = identity | {"on_error": self.images.on_error}  # a resumed run may have another, processes may not
        with self.processes.barrier():
            for rank, other in enumerate(self.processes.gather(identity)):
                if names := differing(identity, other | {"process": 0}):
                    raise InputError(
                        f"process {rank} does not have the same {names} as process 0; start all with the same model, "
                        "images and options"
                    )

    def _identity(self, measures: Sequence[Measure]) -> dict[str, Any]:
        """What must be the same for a run to be resumed."""
        config = self._model_provenance["config"]
        return {
            "model": {
                "weights": self._model_provenance["weights_sha256"],
                # Other types may print as a memory address, which differs in every process.
                "config": config if isinstance(config, dict) else None,
            },
            "images": self.images.identity(),
            "preprocessing": asdict(self.images.preprocessing) if self.images.preprocessing else None,
            "grid": asdict(self.grid),
            "batch size": self.images.batch_size,
            "measures": [[measure.name, measure.options] for measure in measures],
            # Other versions may compute other numbers, and store other sums.
            **{f"version of {name}": software_versions()[name] for name in ("torch", "vit_probe")},
            "number of processes": self.processes.world_size,
            "process": self.processes.rank,
        }

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Move the model to the run's device, and back at the end."""
        with exclusive_use(self.model):
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
            "unfused": self.layout.unfused,
            "options": options,
            "versions": software_versions(),
        }

    @cached_property
    def _model_provenance(self) -> dict[str, Any]:
        return model_provenance(self.model)


def model_config(model: nn.Module) -> Any:
    """The model's configuration, as a dictionary if it is a dataclass or of transformers; None if it has none."""
    config: Any = getattr(unwrap(model), "config", None)
    if hasattr(config, "to_dict"):  # transformers
        config = config.to_dict()
    return asdict(config) if is_dataclass(config) and not isinstance(config, type) else config


def model_provenance(model: nn.Module) -> dict[str, Any]:
    """Name, class, configuration and hash of the weights."""
    model = unwrap(model)
    return {
        "name": getattr(model, "name", type(model).__name__),
        "class": type(model).__name__,
        "config": model_config(model),
        "weights_sha256": weights_sha256(model),
    }
