"""What the command line shows: progress, tables, where files lie, complaints."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.exceptions import Abort, TyperException

from vit_probe.errors import AssumptionWarning, InputError, ProcessGone, SharedInputError
from vit_probe.runner.distributed import Processes

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["command", "complain", "print_table", "progress", "report", "run"]

_USAGE = timedelta(seconds=30)  # for all to come, once one cannot read its arguments: others may never come


def complain(sentence: str) -> None:
    """One sentence on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"vit-probe: {sentence}", markup=False)


def command(function: Callable[..., Any]) -> typer.Typer:
    """A program whose arguments are those of the function, and whose help is what the function's module says of itself."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    paragraphs = (sys.modules[function.__module__].__doc__ or "").split("\n\n")
    lines = (text if text.startswith(" ") else " ".join(text.split()) for text in paragraphs)  # code stays as it is
    app.command(help="\n\n".join(lines))(function)
    return app


def run(program: typer.Typer | Callable[..., Any]) -> None:
    """Runs a program, in this process or as one of several; what the user can put right is one sentence and exit code 2.

    Its commands find their `Processes` as `obj` in typer's context.

    Args:
        program: A typer application, or the function that is the one command of it.
    """
    app = program if isinstance(program, typer.Typer) else command(program)
    try:
        processes = Processes.from_env()
    except InputError as error:
        complain(str(error))
        sys.exit(2)
    try:
        code = _run(app, processes)
    finally:
        processes.leave()
    sys.exit(code)


def _run(app: typer.Typer, processes: Processes) -> int:
    """The exit code. Of several processes the first alone prints, but for what another alone has met."""
    warnings.showwarning = _show_warning
    warnings.simplefilter("always" if processes.is_main else "ignore", AssumptionWarning)
    name = f"process {processes.rank} of {processes.count}"
    try:
        with _told_to_end(processes), nullcontext() if processes.is_main else redirect_stdout(StringIO()):
            return _called(app, processes)
    except SharedInputError as error:
        message, shared = str(error), True
    except InputError as error:
        message, shared = str(error) if processes.count == 1 else f"in {name}: {error}", False
    except ProcessGone as error:
        message, shared = f"{error}; the same command with --resume goes on with what was done", False
    except _Ended:
        if processes.is_main:
            complain(f"{name} was told to end, as torchrun does when one is gone; the same command with --resume goes on")
        return 128 + signal.SIGTERM
    except (Abort, KeyboardInterrupt):
        return 130
    if processes.is_main or not shared:
        complain(message)
    if shared:
        with suppress(ProcessGone):  # not before the first has spoken: torchrun ends all as soon as one has failed
            processes.broadcast(None)
    return 2


def _called(app: typer.Typer, processes: Processes) -> int:
    """The exit code of the command. What is wrong with the arguments of one process or of all is an InputError in all."""
    try:
        return app(standalone_mode=False, obj=processes) or 0
    except TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if not message:  # no command, and help was shown
            return 2
        wrong = InputError(message.replace("Value error, ", ""))
    try:
        processes.init(_USAGE)
    except InputError:
        raise wrong from None
    with processes.barrier():
        raise wrong


class _Ended(BaseException):
    """Whoever started several processes told this one to end."""


@contextmanager
def _told_to_end(processes: Processes) -> Iterator[None]:
    """Has SIGTERM, with which torchrun ends the others when one process is gone, raise `_Ended`.

    While this process waits for another, inside gloo, Python does not serve the signal before that wait is over: the others
    have to end as well, as they do under torchrun. To end this one alone takes SIGKILL, which loses nothing of its state.
    """

    def end(*signal_and_frame: object) -> None:
        raise _Ended

    if processes.count == 1:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all that is left is to say how it ended


def _show_warning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
    """A `warnings.showwarning` that says what was assumed; other libraries' warnings are not for the user of a command."""
    if issubclass(category, AssumptionWarning):
        complain(f"note: {message}")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on standard output, floats with four digits."""
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    Console(highlight=False).print(table)


def report(files: Sequence[Path], summary: pd.DataFrame) -> None:
    """The summary of a result, what it leaves out, and where its files lie."""
    print_table(list(summary.columns), summary.itertuples(index=False))
    console = Console(highlight=False, soft_wrap=True)
    for name, reason in summary.attrs.get("skipped", {}).items():
        console.print(f"not in the table: the attention of {name} ({reason})", markup=False)
    for path in files:
        console.print(str(path), markup=False)


@contextmanager
def progress(total: int | None, processes: Processes | None = None) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left on standard error, if that is a terminal; yields what is told the number of images done.

    Of several processes the first shows how far it is with its own share.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.{0 if speed >= 10 else 1}f} images/s")

    console = Console(stderr=True)
    processes = processes or Processes()
    share = "images" if processes.count == 1 else f"images of the first of {processes.count} processes"
    columns = TextColumn(share), BarColumn(), MofNCompleteColumn(), Rate(), TextColumn("left"), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not (processes.is_main and console.is_terminal)) as bar:
        task = bar.add_task("images", total=total)
        yield lambda count: bar.advance(task, count)
