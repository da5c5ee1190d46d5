"""Photographs on disk for the tests of images."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.test_preprocessing import noise


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four photographs, one of them in a subfolder, and a text file."""
    (tmp_path / "below").mkdir()
    for index, name in enumerate(("b.png", "a.JPG", "c.jpeg", "below/d.png")):
        noise(40, 50, index).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path
