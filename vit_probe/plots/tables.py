"""What plots ask of a table before they draw it."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from vit_probe.errors import InputError

__all__ = ["check_columns", "check_rows"]


def check_columns(frame: pd.DataFrame, columns: Sequence[str], what: str, remedy: str) -> None:
    """Raise InputError if columns are missing.

    Args:
        frame: The table.
        columns: What it must have.
        what: The table in words, for the message.
        remedy: Where to get such a table, for the message.
    """
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise InputError(f"{what} lacks the columns {', '.join(missing)}; {remedy}")


def check_rows(frame: pd.DataFrame, what: str, remedy: str) -> None:
    """Raise InputError if there is no row; `what` and `remedy` as for `check_columns`."""
    if frame.empty:
        raise InputError(f"{what} has no rows; {remedy}")
