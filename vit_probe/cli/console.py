"""What the command line shows: progress, tables, files, errors; and running a program so that it does."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from datetime import timedelta
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.exceptions import Abort, TyperException

from vit_probe.errors import AssumptionWarning, InputError, ProcessExited, SharedInputError
from vit_probe.runner.distributed import ProcessGroup

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EXIT_CODES", "Interrupted", "complain", "print_table", "progress", "report", "run", "single_command", "unwrapped"]

EXIT_CODES = (
    "Exit codes: 0 if all went well; 2 if the input cannot be used, a disk is full, or another process of the run has ended; "
    "130 after Ctrl-C, 143 after SIGTERM, 141 if whatever reads the output has ended; 1 after any other error, which is a bug "
    "of vit_probe."
)
_USAGE = timedelta(seconds=30)  # to wait for the other processes after a usage error: they may have ended with the same one


def complain(sentence: str) -> None:
    """Print one sentence to standard error."""
    with suppress(OSError):  # nothing can be said where standard error cannot be written
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"vit-probe: {sentence}", markup=False)


def single_command(function: Callable[..., Any]) -> typer.Typer:
    """A program with the arguments of a function, and the docstring of the function's module as its help."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=unwrapped(sys.modules[function.__module__].__doc__ or ""), epilog=EXIT_CODES)(function)
    return app


def unwrapped(text: str) -> str:
    """A docstring with each paragraph and list item on one line, for the terminal to wrap; indented code is left alone."""
    paragraphs = text.replace("\n- ", "\n\n- ").split("\n\n")
    return "\n\n".join(part if part.startswith(" ") else " ".join(part.split()) for part in paragraphs)


def run(program: typer.Typer | Callable[..., Any]) -> None:
    """Run a program, in this process or as one of several. Errors of the user are printed as one sentence; see `EXIT_CODES`.

    Commands find their `ProcessGroup` as `obj` in typer's context.

    Args:
        program: A typer application, or a function that is its only command.
    """
    app = program if isinstance(program, typer.Typer) else single_command(program)
    try:
        processes = ProcessGroup.from_env()
    except InputError as error:
        complain(str(error))
        sys.exit(2)
    try:
        code = _run(app, processes)
    finally:
        processes.destroy()
    sys.exit(code)


def _run(app: typer.Typer, processes: ProcessGroup) -> int:
    """The exit code. Of several processes only the first prints, except for an error that another process alone has met."""
    warnings.showwarning = _show_warning
    warnings.simplefilter("always" if processes.is_main else "ignore", AssumptionWarning)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text that it can encode
    name = f"process {processes.rank} of {processes.world_size}"
    try:
        with _raise_on_signals(processes), nullcontext() if processes.is_main else redirect_stdout(StringIO()):
            code = _invoke(app, processes)
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        _discard_output()
        return 141  # what a shell reports of programs that SIGPIPE ends
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _discard_output()
        message, shared = f"cannot write to standard output: {error.strerror}; free some space, or redirect it elsewhere", False
    except SharedInputError as error:
        message, shared = str(error), True
    except InputError as error:
        message, shared = str(error) if processes.world_size == 1 else f"in {name}: {error}", False
    except ProcessExited as error:
        message, shared = f"{error}; the same command with --resume continues from there", False
    except Interrupted as interruption:
        if processes.is_main:
            complain(interruption.sentence if processes.world_size == 1 else f"{name}: {interruption.sentence}")
        return 128 + interruption.number
    except (Abort, KeyboardInterrupt):
        return 130
    if processes.is_main or not shared:
        complain(message)
    if shared:
        with suppress(ProcessExited):  # torchrun kills all processes once one has failed: wait until the first has printed
            processes.broadcast(None)
    return 2


def _invoke(app: typer.Typer, processes: ProcessGroup) -> int:
    """The exit code of the command. A usage error in one process, or in all, becomes an InputError in all."""
    try:
        return app(standalone_mode=False, obj=processes) or 0
    except TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if not message:  # no command, and help was shown
            return 2
        wrong = InputError(message.replace("Value error, ", ""))
    except SystemExit as end:  # which rich and click make of a pipe that nobody reads
        raise end.__context__ if isinstance(end.__context__, BrokenPipeError) else end from None
    try:
        processes.init(_USAGE)
    except InputError:
        raise wrong from None
    with processes.barrier():
        raise wrong


def _discard_output() -> None:
    """Make the interpreter's last flush succeed where standard output can no longer be written."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


class Interrupted(BaseException):
    """This process has received SIGINT (Ctrl-C) or SIGTERM. Notes say how to go on."""

    def __init__(self, number: int) -> None:
        self.number = number

    @property
    def sentence(self) -> str:
        """What has happened, and the notes."""
        # torchrun sends SIGTERM to the other processes when one has ended.
        happened = "interrupted" if self.number == signal.SIGINT else "terminated by SIGTERM"
        return "; ".join([happened, *getattr(self, "__notes__", [])])


@contextmanager
def _raise_on_signals(processes: ProcessGroup) -> Iterator[None]:
    """Raise `Interrupted` on SIGINT and SIGTERM, unless they are ignored.

    While this process waits for another one inside gloo, Python handles a signal only after that wait: the others have to
    end, too, as they do under torchrun. Only SIGKILL ends a single process at once; its saved state remains.
    """

    def end(number: int, frame: object) -> None:
        raise Interrupted(number)

    earlier = {}
    if threading.current_thread() is threading.main_thread():  # no other can handle signals
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                earlier[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            # Under torchrun all that remains is to print how it ended.
            signal.signal(number, handler if processes.world_size == 1 else signal.SIG_IGN)


def _show_warning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
    """A `warnings.showwarning` for assumptions; warnings of other libraries do not concern the user of a command."""
    if issubclass(category, AssumptionWarning):
        complain(f"note: {message}")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table to standard output, floats with four digits."""
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    Console(highlight=False, markup=False).print(table)


def report(files: Sequence[Path], summary: pd.DataFrame) -> None:
    """Print the summary of a result, the attention that is not in it, and the files that were written."""
    print_table(list(summary.columns), summary.itertuples(index=False))
    console = Console(highlight=False, soft_wrap=True)
    for name, reason in summary.attrs.get("skipped", {}).items():
        console.print(f"not in the table: the attention of {name} ({reason})", markup=False)
    if unfused := summary.attrs.get("unfused"):
        console.print(f"seen at a softmax in the model's own code: the attention of {', '.join(unfused)}", markup=False)
    for path in files:
        console.print(str(path), markup=False)


@contextmanager
def progress(total: int | None, processes: ProcessGroup | None = None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar with rate and time left, if standard error is a terminal; yields a function that advances it.

    Of several processes the first shows the progress of its own share.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.{0 if speed >= 10 else 1}f} images/s")

    console = Console(stderr=True)
    processes = processes or ProcessGroup()
    share = "images" if processes.world_size == 1 else f"images of the first of {processes.world_size} processes"
    columns = TextColumn(share), BarColumn(), MofNCompleteColumn(), Rate(), TextColumn("left"), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not (processes.is_main and console.is_terminal)) as bar:
        task = bar.add_task("images", total=total)
        yield lambda count: bar.advance(task, count)
