"""A hub cache that tests fill with folders, and a photograph."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Add a folder to the cache of the hub's client, in its layout; the hub is at an address where nothing responds."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    def add(repository: str, folder: Path) -> None:
        root = cache / f"models--{repository.replace('/', '--')}"
        shutil.copytree(folder, root / "snapshots" / COMMIT)
        (root / "refs").mkdir()
        (root / "refs/main").write_text(COMMIT)

    return add


@pytest.fixture(scope="session")
def photograph() -> Image.Image:
    """A photograph of 480 x 320 pixels, at which the tests' crops have margins of an even number of pixels."""
    return Image.fromarray(load_sample_image("china.jpg")).crop((40, 60, 520, 380))


def change(folder: Path, *, remove: str = "", **added: torch.Tensor) -> None:
    """Remove the parameters whose names begin with `remove` from a folder's weights, and add others."""
    state = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in state.items() if not (remove and name.startswith(remove))}
    assert len(kept) < len(state) or not remove
    save_file(kept | added, folder / "model.safetensors", metadata={"format": "pt"})
