"""The package as a whole: what it exports, imports and ships."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vit_probe

ROOT = Path(__file__).parent.parent


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_every_public_name_exists() -> None:
    assert len(vit_probe.__all__) <= 20
    for name in vit_probe.__all__:
        assert getattr(vit_probe, name).__doc__
    assert set(vit_probe.__all__) <= set(dir(vit_probe))


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'vit_probe' has no attribute 'nothing'"):
        vit_probe.nothing  # noqa: B018


def test_the_command_line_waits_with_torch() -> None:
    assert not loaded_after("import vit_probe.cli.commands") & {"torch", "matplotlib", "numpy", "sklearn"}


def test_measuring_needs_neither_matplotlib_nor_a_model_library() -> None:
    names = ", ".join(vit_probe.__all__)
    libraries = {"timm", "transformers", "torchvision", "open_clip"}
    assert not loaded_after(f"from vit_probe import {names}") & (libraries | {"matplotlib"})


def test_plots_know_nothing_of_torch() -> None:
    assert "torch" not in loaded_after("import vit_probe.plots")


MODULES = sorted(path for folder in ("vit_probe", "analyses") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_module_is_over_300_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


def test_the_wheel_holds_the_package_only(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"vit_probe"}
    assert {"vit_probe/py.typed", "vit_probe/demo/model.safetensors", "vit_probe/demo/README.md"} <= set(names)
    assert not [name for name in names if "snapshot" in name]
    assert wheel.stat().st_size < 15e6
