"""The README's table of model families is up to date."""

from __future__ import annotations

import pytest

from tests.families.table import BEGIN, END, README, render, section


def test_the_readmes_table_is_up_to_date() -> None:
    text = README.read_text(encoding="utf-8")
    assert section(text) == render(), "README.md's table of families is stale; run: python -m tests.families.table"


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{BEGIN}{BEGIN}{END}"])
def test_markers_must_be_there_once(text: str) -> None:
    with pytest.raises(ValueError, match=r"README\.md must have one"):
        section(text)
