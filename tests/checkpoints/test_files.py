"""Formats told from content, files of other programs, and shards."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from vit_probe.checkpoints.files import expand_home, file_format, read_folder, read_tensors
from vit_probe.errors import InputError

STATE = {"a.weight": torch.ones(2, 3)}


@pytest.mark.parametrize("name", ["x.ckpt", "x.pth.tar", "x", "x.npz", "x.safetensors"])
def test_the_content_tells_the_format(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for zipped in (True, False):
        torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
        assert file_format(path) == "pickle"
        torch.testing.assert_close(read_tensors(path), STATE)
    save_file(STATE, path)
    assert file_format(path) == "safetensors"
    torch.testing.assert_close(read_tensors(path), STATE)
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(1))
    assert file_format(path) == "npz"
    with pytest.raises(InputError, match=r"an \.npz archive .* which is read only as a model in Google's layout"):
        read_tensors(path)


def test_a_header_whose_length_begins_like_a_pickle(tmp_path: Path) -> None:
    for padding in range(300):
        content = save(STATE, metadata={"a": "x" * padding})
        if content[0] == 0x80:
            (tmp_path / "x").write_bytes(content)
            assert file_format(tmp_path / "x") == "safetensors"
            return
    raise AssertionError("no header of this length")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz", ""])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file, as Keras writes"),
        (b"GGUF\x03\0\0\0" + bytes(99), "is a GGUF file"),
        (b"\x08\x08\x12\x07pytorch" + bytes(99), "is an ONNX or TensorFlow model"),
        (b"\x1c\0\0\0TFL3" + bytes(99), "is a TensorFlow Lite model"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"is a pointer of Git LFS .* `git lfs pull`"),
        (b"\n<!DOCTYPE html><html>", "is a web page, perhaps the error page of a failed download"),
        (b"\x1f\x8b\x08" + bytes(99), "is compressed; decompress it first"),
        (b"a" + bytes(256) + b"ustar" + bytes(99), "is a tar archive; unpack it first"),
    ],
)
def test_files_of_other_programs(content: bytes, message: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        file_format(path)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt"])
def test_archives_that_hold_programs(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"ViT-B-32{suffix}"
    torch.jit.trace(torch.nn.Conv2d(3, 2, 2, 2), torch.rand(1, 3, 4, 4)).save(str(path))
    with pytest.raises(InputError, match=r"is a TorchScript archive, .* load it with torch\.jit\.load"):
        read_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vit/.data/extern_modules", "")
    with pytest.raises(InputError, match=r"is a torch\.package archive"):
        read_tensors(path)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file .*nothing\.pth"):
        file_format(tmp_path / "nothing.pth")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(InputError, match=r"folder\.pth is not a regular file"):
        file_format(tmp_path / "folder.pth")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.pth")
        with pytest.raises(InputError, match=r"pipe\.pth is not a regular file"):
            file_format(tmp_path / "pipe.pth")


def _write_index(folder: Path, content: Any) -> None:
    folder.mkdir()
    save_file(STATE, folder / "one.safetensors")
    save_file({"b.weight": torch.zeros(1)}, folder / "two.safetensors")
    save_file(STATE, folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def test_shards(tmp_path: Path) -> None:
    _write_index(tmp_path / "vit", {"weight_map": {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}})
    assert set(read_folder(tmp_path / "vit")) == {"a.weight", "b.weight"}


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "{folder}/one.safetensors", "sub/../one.safetensors", "..\\outside", "..", ".", "", 5, None, []],
)
def test_shards_outside_the_folder(name: Any, tmp_path: Path) -> None:
    if isinstance(name, str):
        name = name.format(folder=tmp_path / "vit")
    _write_index(tmp_path / "vit", {"weight_map": {"a.weight": "one.safetensors", "b.weight": name}})
    with pytest.raises(InputError, match=r"index\.json must map parameters to names of files in its own folder"):
        read_folder(tmp_path / "vit")


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "one.safetensors"}])
def test_an_index_without_shards(content: Any, tmp_path: Path) -> None:
    _write_index(tmp_path / "vit", content)
    with pytest.raises(InputError, match=r"index\.json must map parameters to names of files"):
        read_folder(tmp_path / "vit")


def test_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home("~/model.pth") == Path("/home/me/model.pth")
    with pytest.raises(
        InputError, match=r"^there is no checkpoint ~nobody-of-this-name/x\.pth: ~nobody-of-this-name is no user's"
    ):
        expand_home("~nobody-of-this-name/x.pth")
