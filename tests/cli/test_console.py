"""What the command shows while it works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pandas as pd
import pytest

from vit_probe.cli import console as terminal
from vit_probe.runner.distributed import ProcessGroup


def test_progress_shows_rate_and_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    with terminal.progress(40) as advance:
        for _ in range(3):
            time.sleep(0.05)
            advance(10)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err).split("\r")[-1]
    assert "30/40" in shown
    rate = re.search(r"(\d+) images/s left 0:00:0\d", shown)
    assert rate
    assert 20 < int(rate[1]) <= 200


def test_progress_is_shown_by_the_first_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    for rank in (0, 1):
        with terminal.progress(40, ProcessGroup(rank, 2)) as advance:
            advance(10)
        assert ("images of the first of 2 processes" in capsys.readouterr().err) is (rank == 0)


def test_progress_is_quiet_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    with terminal.progress(None) as advance:
        advance(10)
    assert capsys.readouterr().err == ""


def test_names_in_tables_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_table(["image", "share"], [["[bold]a[red].png", 0.25], ["b[/c].png", 1.0]])
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["[bold]a[red].png", "0.25"],
        ["b[/c].png", "1"],
    ]


def test_layers_seen_at_a_softmax_are_named_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    table = pd.DataFrame({"layer": [0]})
    table.attrs["unfused"] = ["blocks.0.attn", "blocks.1.attn"]
    terminal.report([], table)
    assert "seen at a softmax in the model's own code: the attention of blocks.0.attn, blocks.1.attn" in capsys.readouterr().out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_a_full_disk_behind_standard_output() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-m", "vit_probe", "models"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("vit-probe: cannot write to standard output: No space left on device; ")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["models"], ["--help"]])
def test_a_pipe_that_nobody_reads(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "vit_probe", *arguments]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")
