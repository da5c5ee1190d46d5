"""The package as a whole: what it exports, imports and ships."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vit_probe
from vit_probe.measures.base.discovery import measure_files

ROOT = Path(__file__).parent.parent


def loaded_after(statement: str, prefix: str = "") -> set[str]:
    """Modules directly below `prefix` (top-level ones, without it) that a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    depth = prefix.count(".") + 1
    return {".".join(name.split(".")[:depth]) for name in names if name.startswith(prefix)}


def test_every_public_name_exists() -> None:
    for name in vit_probe.__all__:
        assert getattr(vit_probe, name).__doc__, name
    assert set(vit_probe.__all__) <= set(dir(vit_probe))


def test_the_rooms_are_few() -> None:
    entries = [path.name for path in (ROOT / "vit_probe").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 17


def test_every_measure_is_a_public_name() -> None:
    for one in measure_files().values():
        assert one.function in vit_probe.__all__
        assert getattr(vit_probe, one.function) is getattr(vit_probe.measures, one.function)


def test_a_function_goes_before_the_module_of_its_name() -> None:
    code = "import vit_probe.measures.token_norms; import vit_probe; print(callable(vit_probe.measures.token_norms))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"


def test_one_measure_is_imported_without_the_others() -> None:
    loaded = loaded_after("from vit_probe import mean_attention_distance", prefix="vit_probe.measures.")
    assert loaded == {"vit_probe.measures.attention_distance", "vit_probe.measures.base"}


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'vit_probe' has no attribute 'nothing'"):
        vit_probe.nothing  # noqa: B018


def test_the_command_line_waits_with_torch() -> None:
    assert not loaded_after("import vit_probe.cli.commands") & {"torch", "matplotlib", "numpy", "sklearn"}


def test_measuring_needs_neither_matplotlib_nor_a_model_library() -> None:
    names = ", ".join(name for name in vit_probe.__all__ if name != "plots")
    libraries = {"timm", "transformers", "torchvision", "open_clip"}
    assert not loaded_after(f"from vit_probe import {names}") & (libraries | {"matplotlib"})


def test_plots_know_nothing_of_torch() -> None:
    assert "torch" not in loaded_after("import vit_probe.plots")


def test_the_wheel_holds_the_package_only(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"vit_probe"}
    assert {"vit_probe/py.typed", "vit_probe/demo/model.safetensors", "vit_probe/demo/README.md"} <= set(names)
    assert not [name for name in names if "snapshot" in name]
    assert wheel.stat().st_size < 15e6
