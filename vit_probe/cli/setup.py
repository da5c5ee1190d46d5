"""The steps that the commands have in common. What is heavy is imported when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from vit_probe.cli import console as terminal
from vit_probe.cli.options import Format
from vit_probe.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from vit_probe.attention.tiles import AttentionObserver
    from vit_probe.runner.distributed import Processes
    from vit_probe.runner.run import AttentionRun

__all__ = ["load", "open_run", "prepare", "run_measures", "skip_unsupported"]

_Made = TypeVar("_Made")


def prepare(
    images: list[Path] | None,
    more: list[Path] | None,
    out: Path,
    limit: int | None,
    formats: Sequence[Format] | None,
) -> tuple[Path, list[str], list[Any]]:
    """Everything that can be checked before the model is loaded: the images there are, the output folder, the formats."""
    from vit_probe.atomic_io import writable_folder

    photographs: list[Any] = []
    if limit is not None:
        from vit_probe.data.preprocessing import find_images, sample_photographs

        sources = [*(images or ()), *(more or ())]
        photographs = list(find_images(sources)[:limit]) if sources else list(sample_photographs(min(limit, 128)))
    return writable_folder(out), [name.value for name in dict.fromkeys(formats or [Format.png])], photographs


def load(model: str) -> nn.Module:
    """The model that `--model` names."""
    from vit_probe.checkpoints import load_model

    return load_model(model)


def open_run(
    processes: Processes,
    model: str,
    images: list[Path] | None,
    more: list[Path] | None,
    out: Path,
    limit: int,
    formats: Sequence[Format] | None,
    batch_size: int,
    device: str,
    on_error: Literal["stop", "skip"],
    *,
    shows_images: bool = False,
) -> tuple[Path, list[str], AttentionRun]:
    """The output folder, the formats, and the pass of the photographs through the model, before anything is measured."""
    folder, endings, photographs = prepare(images, more, out, limit, formats)
    loaded = load(model)
    from vit_probe.measures.base.per_image import SHOWN_IMAGES
    from vit_probe.runner.run import AttentionRun

    run = AttentionRun(
        loaded,
        photographs,
        batch_size=batch_size,
        device=device,
        on_error=on_error,
        processes=processes,
        keep_images=SHOWN_IMAGES if shows_images else 0,
    )
    return folder, endings, run


def skip_unsupported(what: str, make: Callable[[], _Made], verbose: bool = True) -> _Made | None:
    """What `make` returns; None, with a note, where this model does not have it."""
    try:
        return make()
    except InputError as error:
        if verbose:
            terminal.complain(f"note: {what} left out: {error}")
        return None


@contextmanager
def run_measures(run: AttentionRun, folder: Path, resume: bool, *measures: AttentionObserver) -> Iterator[None]:
    """Shows the photographs to the measures; keeps the state in `folder` until what is done with them has succeeded."""
    from vit_probe.runner.resume import state_file

    processes = run.processes
    with processes.barrier():
        state = state_file(folder, processes.rank, processes.count, resume=resume)
    with terminal.progress(run.images.count, processes) as advance:
        run.observe(*measures, progress=advance, state=state)
    if processes.is_main:
        for name, reason in run.images.skipped:
            terminal.complain(f"note: {name} is left out: {reason}")
    with processes.barrier():
        yield
    state.unlink()
