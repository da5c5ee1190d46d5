"""What the command line shows: progress, tables, where files lie, complaints."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.exceptions import Abort, TyperException

from vit_probe.errors import AssumptionWarning, InputError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["complain", "print_table", "progress", "report", "run"]


def complain(sentence: str) -> None:
    """One sentence on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"vit-probe: {sentence}", markup=False)


def run(app: typer.Typer) -> None:
    """Runs a command; what the user can put right is one sentence on standard error and exit code 2."""
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", AssumptionWarning)
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except InputError as error:
        message = str(error)
    except TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        message = message.replace("Value error, ", "")
        if not message:  # no command: help was shown
            sys.exit(2)
    except (Abort, KeyboardInterrupt):
        sys.exit(130)
    complain(message)
    sys.exit(2)


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
def progress(total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left on standard error, if that is a terminal; yields what is told the number of images done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.{0 if speed >= 10 else 1}f} images/s")

    console = Console(stderr=True)
    columns = TextColumn("images"), BarColumn(), MofNCompleteColumn(), Rate(), TextColumn("left"), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=total)
        yield lambda count: bar.advance(task, count)
