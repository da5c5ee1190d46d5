"""Training images that a tiny model learns in seconds: horizontal stripes, vertical stripes, none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.analyses.small_models import write_photographs
from vit_probe.cli.study import run_study

CLASSES = ("across", "down", "plain")


def picture(name: str, random: np.random.Generator, size: int = 16) -> np.ndarray:
    """Noise, with stripes four pixels wide at a random phase unless the class is `plain`."""
    pixels = random.integers(60, 196, (size, size, 3))
    phase, stripes = random.integers(8), np.arange(size)
    light = np.where((stripes + phase) % 8 < 4, 60, -60)
    if name != "plain":
        pixels = pixels + (light[:, None, None] if name == "across" else light[None, :, None])
    return pixels.clip(1, 255).astype(np.uint8)


def write_sheets(folder: Path, counts: dict[str, int], seed: int) -> None:
    """One sheet per class, 20 pictures per row, the last row padded with black."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for name, count in counts.items():
        rows = -(-count // 20)
        sheet = np.zeros((rows * 16, 20 * 16, 3), np.uint8)
        for index in range(count):
            row, col = divmod(index, 20)
            sheet[16 * row : 16 * row + 16, 16 * col : 16 * col + 16] = picture(name, random)
        Image.fromarray(sheet).save(folder / f"{name}.png")


@pytest.fixture(autouse=True, scope="session")
def on_the_cpu() -> Iterator[None]:
    """Training on a GPU is not reproducible to the last bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="session")
def sheets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` with 90, 90 and 75 images, `val` with 20 of each class."""
    folder = tmp_path_factory.mktemp("sheets")
    write_sheets(folder / "train", dict(zip(CLASSES, (90, 90, 75), strict=True)), seed=0)
    write_sheets(folder / "val", dict.fromkeys(CLASSES, 20), seed=1)
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photographs of 16 x 16 pixels."""
    return write_photographs(tmp_path_factory.mktemp("images") / "photographs")


def typed(monkeypatch: pytest.MonkeyPatch, main: Callable[..., Any], *arguments: object) -> int:
    """The exit code of a study run from the command line with these arguments."""
    monkeypatch.setattr(sys, "argv", ["study", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_study(main)
    return int(ended.value.code or 0)
