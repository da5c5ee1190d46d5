"""Interrupted commands, commands that share a folder, exit codes, and names of files that are not text."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.cli.test_commands import checkpoint, photographs, run  # noqa: F401  (fixtures)
from vit_probe import InputError
from vit_probe.atomic_io import locked_folder
from vit_probe.cli import console
from vit_probe.cli.export import _write_csv
from vit_probe.runner.distributed import ProcessGroup

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    checkpoint: Path,  # noqa: F811
    photographs: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Runs `vit-probe distance` on five photographs, one per batch."""
    arguments = ["distance", "--model", checkpoint, "--images", photographs, "--batch-size", 1, "--device", "cpu", "--out"]
    return lambda out, *more: run(capsys, monkeypatch, *arguments, out, *more)


def sends(number: int, monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Send this process a signal after some images."""

    @contextmanager
    def progress(total: int | None, processes: ProcessGroup | None = None) -> Iterator[Callable[[int], None]]:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if done == after:
                signal.raise_signal(number)

        yield advance

    monkeypatch.setattr(console, "progress", progress)


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_an_interrupted_command_continues(
    number: int, code: int, word: str, command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(number)
    with monkeypatch.context() as patched:
        sends(number, patched, after=2)
        ended = command(tmp_path / "out")
    assert ended[0] == code
    (line,) = [line for line in ended[2].splitlines() if "note: " not in line]
    assert line.startswith(f"vit-probe: {word}")
    assert line.endswith("; the same command with --resume continues from there")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run-state.safetensors"]  # and no lock
    assert signal.getsignal(number) is handler
    counts: list[int] = []
    with monkeypatch.context() as patched:
        real = console.progress

        @contextmanager
        def progress(*arguments: Any) -> Iterator[Callable[[int], None]]:
            with real(*arguments) as advance:
                yield lambda count: (counts.append(count), advance(count))[1]

        patched.setattr(console, "progress", progress)
        assert command(tmp_path / "out", "--resume")[0] == 0
    assert counts == [3, 1, 1]  # the signal came after the second image, and waited for the third
    assert command(tmp_path / "whole")[0] == 0
    resumed, whole = (pd.read_csv(tmp_path / name / "attention_distance.csv") for name in ("out", "whole"))
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)


def test_without_a_state_there_is_nothing_to_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vit_probe.cli.setup.find_photographs", lambda *_: signal.raise_signal(signal.SIGINT))
    code, _, err = run(capsys, monkeypatch, "distance", "--out", tmp_path)
    assert (code, err) == (130, "vit-probe: interrupted\n")


def test_a_second_run_in_the_same_folder_is_refused(command: Run, tmp_path: Path) -> None:
    with locked_folder(tmp_path):
        code, printed, err = command(tmp_path)
        assert (code, printed) == (2, "")
        assert f"vit-probe: another run writes into {tmp_path}; wait until it has ended, or choose another folder" in err
        assert command(tmp_path / "other")[0] == 0
    assert command(tmp_path)[0] == 0
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    program = """
import os, pathlib, sys
from vit_probe.atomic_io import locked_folder
with locked_folder(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match="another run writes into"), locked_folder(tmp_path):
            pytest.fail("two at once")
        process.kill()
    with locked_folder(tmp_path):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with locked_folder(tmp_path), locked_folder(tmp_path):
        pass


def test_exit_codes_are_in_the_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    code, printed, _ = run(capsys, monkeypatch, "--help")
    assert code == 0
    for meaning in ("0 if all went well", "2 if the input cannot be used", "130 after Ctrl-C", "143 after SIGTERM"):
        assert meaning in printed


def test_names_that_are_no_text_are_printed_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8", errors="strict"))
    with pytest.raises(SystemExit):
        console.run(lambda: console.report([Path(name)], pd.DataFrame({"image": [name]})))
    sys.stdout.flush()
    escaped = name.encode(errors="backslashreplace")
    assert raw.getvalue().count(escaped) == 2
    assert escaped in _write_csv(pd.DataFrame({"image": [name]}), tmp_path / "table.csv").read_bytes()
