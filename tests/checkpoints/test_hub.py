"""Downloading from the hub with its real client: from its cache, without a network, and from a small local hub."""

from __future__ import annotations

import builtins
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import IncompleteSnapshotError
from safetensors.torch import save_file

from tests.checkpoints.parity import assert_same, images, randomize
from vit_probe.checkpoints import hub as hub_module
from vit_probe.checkpoints import load_model
from vit_probe.checkpoints.hub import fetch
from vit_probe.errors import InputError
from vit_probe.models.config import ViTConfig
from vit_probe.models.vit import VisionTransformer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TINY = ViTConfig(image_size=48, patch_size=8, embed_dim=192, depth=1, num_heads=3, num_classes=7)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub at an address where nothing responds."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


def _put(cache: Path, repository: str, model: torch.nn.Module, *, pickled: bool = False) -> None:
    """Add a repository to the cache, in the client's own layout."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs/main").write_text(COMMIT)
    cfg = {"input_size": [3, 48, 48], "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    (snapshot / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch8_48", "pretrained_cfg": cfg}))
    if pickled:
        torch.save(model.state_dict(), snapshot / "pytorch_model.bin")
    else:
        save_file(model.state_dict(), snapshot / "model.safetensors")


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize(
    ("name", "repository"), [("timm:vit_tiny.mine", "timm/vit_tiny.mine"), ("hf:someone/vit", "someone/vit")]
)
def test_cached_files_need_no_network(name: str, repository: str, pickled: bool, cache: Path) -> None:
    model = randomize(VisionTransformer(TINY))
    _put(cache, repository, model, pickled=pickled)
    loaded = load_model(name)
    assert loaded.name == name
    assert loaded.preprocessing is not None
    assert (loaded.preprocessing.size, loaded.preprocessing.resize) == ((48, 48), 53)
    with torch.no_grad():
        assert_same(loaded(images(48)), model(images(48)), tolerance=1e-12)


def test_without_network_a_short_error_soon(cache: Path) -> None:
    start = time.monotonic()
    message = (
        r"^timm/vit_tiny is not in the local cache, and the hub cannot be reached; check the network, or pass a local folder$"
    )
    with pytest.raises(InputError, match=message):
        load_model("timm:vit_tiny")
    assert time.monotonic() - start < 20


def test_an_unresponsive_hub_is_not_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _put(cache, "someone/vit", VisionTransformer(TINY))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub_module, "_TIMEOUT", 0.5)
        start = time.monotonic()
        assert load_model("hf:someone/vit").config == TINY
        with pytest.raises(InputError, match="the hub cannot be reached"):
            load_model("hf:someone/other")
        assert time.monotonic() - start < 5
    monkeypatch.undo()
    assert hub_module._TIMEOUT < 20


def test_offline_mode_is_respected(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"someone/vit is not in the local cache"):
        load_model("hf:someone/vit")
    _put(cache, "someone/vit", VisionTransformer(TINY))
    assert load_model("hf:someone/vit").config == TINY


@pytest.mark.parametrize("name", ["hf:vit", "hf:", "timm:", "hf:a/b/c", "hf:some one/vit", "timm:other/vit/x"])
def test_invalid_names(name: str, cache: Path) -> None:
    with pytest.raises(InputError, match=r"is not the name of a model on the hub; write hf:ORG/NAME or timm:NAME"):
        load_model(name)


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that a download needs: one repository, `a/b`, and error responses for others."""

    files: ClassVar[dict[str, bytes]] = {}
    errors: ClassVar[dict[str, tuple[int, str]]] = {
        "a/none": (404, "RepoNotFound"), "timm/": (404, "RepoNotFound"), "a/gated": (403, "GatedRepo"), "a/down": (500, "")
    }  # fmt: skip

    def do_GET(self) -> None:
        for repository, (status, code) in self.errors.items():
            if repository in self.path:
                return self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "refused"})
        if self.path.startswith("/api/models/a/b/revision/"):
            return self._send(200, json.dumps({"id": "a/b", "modelId": "a/b", "sha": COMMIT, "siblings": []}).encode())
        if self.path.startswith("/api/models/a/b/tree/"):
            tree = [{"type": "file", "oid": "0" * 40, "size": len(data), "path": name} for name, data in self.files.items()]
            return self._send(200, json.dumps(tree).encode())
        name = self.path.partition("/resolve/")[2].partition("/")[2]
        if name in self.files:
            return self._send(200, self.files[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})
        return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(Hub, "files", {})
    yield Hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("pickled", [False, True])
def test_a_download(pickled: bool, hub: type[Hub], cache: Path) -> None:
    """Pickled weights are downloaded only if there are no others; other frameworks' weights never."""
    model = randomize(VisionTransformer(TINY))
    _put(cache, "some/where", model)
    _put(cache, "some/pickle", model, pickled=True)
    hub.files |= {file.name: file.read_bytes() for file in cache.glob("models--some--pickle/snapshots/*/*")}
    if not pickled:
        hub.files |= {file.name: file.read_bytes() for file in cache.glob("models--some--where/snapshots/*/*")}
    hub.files |= {"README.md": b"#", "tf_model.h5": b"h5", "flax_model.msgpack": b"flax", "onnx/model.onnx": b"onnx"}
    loaded = load_model("hf:a/b")
    assert loaded.name == "hf:a/b"
    with torch.no_grad():
        assert_same(loaded(images(48)), model(images(48)), tolerance=1e-12)
    weights = "pytorch_model.bin" if pickled else "model.safetensors"
    assert {path.name for path in fetch("hf:a/b").iterdir()} == {"config.json", weights}


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        ("a/none", r"^the hub has no repository a/none, or it is private; check the name$"),
        ("a/gated", r"^hf:a/gated is only for users who accepted its terms; .*//huggingface\.co/a/gated, .*hf auth login`$"),
        ("a/down", r"^a/down is not in the local cache, and the hub cannot be reached"),
    ],
)
def test_error_responses_of_the_hub(repository: str, message: str, hub: type[Hub]) -> None:
    with pytest.raises(InputError, match=message):
        load_model(f"hf:{repository}")


def test_an_unknown_timm_name_gets_suggestions(hub: type[Hub]) -> None:
    pytest.importorskip("timm")
    message = r"^the hub has no repository timm/vit_tiny_patch16_224, .*; similar names are vit_tiny_patch16_224\.augreg_in21k"
    with pytest.raises(InputError, match=message):
        load_model("timm:vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            IncompleteSnapshotError("partial", snapshot_path="here"),
            "^the cached copy of a/b is incomplete, and the hub cannot be reached",
        ),
        (
            OSError("No space left\nmore"),
            r"^a/b cannot be fetched from the hub \(OSError: No space left\)$",
        ),
    ],
)
def test_other_errors_of_the_client(error: Exception, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*arguments: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match=message):
        fetch("hf:a/b")


def test_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "huggingface_hub":
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        InputError, match=r"^fetching timm:vit needs the package huggingface_hub: pip install 'vit-probe\[hub\]'$"
    ):
        load_model("timm:vit")
