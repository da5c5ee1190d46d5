"""The steps that commands and studies share. Slow imports wait until they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vit_probe.cli import console
from vit_probe.cli.options import Format, RunOptions
from vit_probe.errors import InputError

if TYPE_CHECKING:
    import typer

    from vit_probe.runner.distributed import ProcessGroup
    from vit_probe.runner.protocol import Measure
    from vit_probe.runner.run import AttentionRun

__all__ = ["file_formats", "find_photographs", "open_run", "output_folder", "run_measures", "skip_unsupported"]

Made = TypeVar("Made")


def output_folder(out: Path) -> Path:
    """The folder, made if need be, in which files can be written."""
    from vit_probe.atomic_io import writable_folder

    return writable_folder(out)


def file_formats(formats: Sequence[Format] | None) -> list[str]:
    """The endings of the pictures, each once."""
    return [one.value for one in dict.fromkeys(formats or [Format.png])]


def find_photographs(paths: Sequence[Path] | None, limit: int) -> list[Any]:
    """The photographs below some paths; without any, sample photographs."""
    from vit_probe.data.image_files import find_images
    from vit_probe.data.preprocessing import sample_photographs

    return list(find_images(paths)[:limit]) if paths else list(sample_photographs(min(limit, 128)))


def open_run(context: typer.Context, options: RunOptions, *, shows_images: bool = False) -> AttentionRun:
    """The pass of the photographs through the model, ready for measures. Paths and options are checked before it is loaded.

    Until the command ends, the output folder is locked: two runs would overwrite each other's state.
    """
    from vit_probe.atomic_io import locked_folder

    processes: ProcessGroup = context.obj
    output_folder(options.out)
    if processes.is_main:
        context.with_resource(locked_folder(options.out))
    photographs = find_photographs([*(options.images or ()), *(options.paths or ())], options.limit)
    from vit_probe.checkpoints import load_model
    from vit_probe.measures.base.registry import SHOWN_IMAGES
    from vit_probe.runner.run import AttentionRun

    return AttentionRun(
        load_model(options.model),
        photographs,
        batch_size=options.batch_size,
        device=options.device,
        on_error=options.on_error,
        processes=processes,
        keep_images=SHOWN_IMAGES if shows_images else 0,
    )


def skip_unsupported(display_name: str, make: Callable[[], Made], *, verbose: bool = True) -> Made | None:
    """What `make` returns; None, with a note, where the model does not support it."""
    try:
        return make()
    except InputError as error:
        if verbose:
            console.complain(f"note: {display_name} left out: {error}")
        return None


@contextmanager
def run_measures(run: AttentionRun, options: RunOptions, *measures: Measure) -> Iterator[None]:
    """Show the photographs to the measures, then enter the context; the state of the run is kept until that has succeeded."""
    from vit_probe.runner.resume import state_file

    processes = run.processes
    with processes.barrier():
        state = state_file(options.out, processes.rank, processes.world_size, resume=options.resume)
    try:
        with console.progress(run.images.count, processes) as advance:
            run.observe(*measures, progress=advance, state=state)
        if processes.is_main:
            for name, reason in run.images.skipped:
                console.complain(f"note: {name} is left out: {reason}")
        with processes.barrier():
            yield
    except console.Interrupted as interruption:
        if state.exists():
            interruption.add_note("the same command with --resume continues from there")
        raise
    state.unlink(missing_ok=True)
