"""Fetching checkpoints from the Hugging Face hub, through its own client and its cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from vit_probe.checkpoints.libraries import timm
from vit_probe.errors import InputError

__all__ = ["LIBRARY_FILES", "OPEN_CLIP_FILES", "PREFIXES", "Files", "fetch"]

PREFIXES = ("hf:", "timm:")

_PATIENCE = 15.0  # seconds


@dataclass(frozen=True)
class Files:
    """Patterns of the files to fetch: configurations; weights as safetensors; pickled weights, where there are none."""

    configuration: tuple[str, ...]
    safetensors: tuple[str, ...]
    pickles: tuple[str, ...]


LIBRARY_FILES = Files(
    ("config.json", "preprocessor_config.json", "processor_config.json"),
    ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"),
)
"""Of timm's and transformers' repositories."""
OPEN_CLIP_FILES = Files(("open_clip_config.json",), ("open_clip_model.safetensors",), ("open_clip_pytorch_model.bin",))


def fetch(name: str, files: Files = LIBRARY_FILES) -> Path:
    """The local folder of a model's files, downloaded unless the client's cache holds them.

    Only configurations and PyTorch weights are fetched, the pickled ones only where there are no safetensors. Without
    network, what is cached is used.

    Args:
        name: `hf:ORG/NAME`, or `timm:NAME` for the repository `timm/NAME`.
        files: What to fetch.

    Raises:
        InputError: If the client is not installed, the repository does not exist or may not be read, or there is neither a
            network nor a cached copy.
    """
    source, _, repository = name.partition(":")
    if source == "timm" and "/" not in repository:
        repository = f"timm/{repository}"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            IncompleteSnapshotError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError:
        raise InputError(f"fetching {name} needs the package huggingface_hub: pip install 'vit-probe[hub]'") from None
    if repository.count("/") != 1:
        raise InputError(f"{name} names no model of the hub; write hf:ORG/NAME or timm:NAME")
    try:
        cached = not _answers(repository)
        for weights in (files.safetensors, files.pickles):
            wanted = [*files.configuration, *weights]
            folder = Path(snapshot_download(repository, allow_patterns=wanted, local_files_only=cached))
            if any(any(folder.glob(pattern)) for pattern in weights):
                break
        return folder
    except HFValidationError:
        raise InputError(f"{name} names no model of the hub; write hf:ORG/NAME or timm:NAME") from None
    except GatedRepoError:
        raise InputError(
            f"{name} is only for users who accepted its terms; accept them at https://huggingface.co/{repository}, then "
            "log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        similar = timm.similar_names(repository.removeprefix("timm/")) if source == "timm" else ""
        raise InputError(f"the hub has no repository {repository}, or it is private; check the name{similar}") from None
    except IncompleteSnapshotError:
        raise InputError(
            f"the cached copy of {repository} is incomplete, and the hub cannot be reached; check the network and try again"
        ) from None
    except LocalEntryNotFoundError:
        raise InputError(
            f"{repository} is not in the local cache, and the hub cannot be reached; check the network, or pass a local folder"
        ) from None
    except Exception as error:  # its transport's own exceptions come through as they are: proxies, certificates, time-outs
        reason = str(error).partition("\n")[0]
        raise InputError(f"{repository} cannot be fetched from the hub ({type(error).__name__}: {reason})") from None


def _answers(repository: str) -> bool:
    """Whether the hub answers at all, within `_PATIENCE` seconds; it may answer that there is no such repository.

    `snapshot_download` sets no time limit of its own: where packets are dropped it would wait for minutes.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    answers: list[bool] = []

    def ask() -> None:
        try:
            HfApi().repo_info(repository, timeout=_PATIENCE)
        except (HfHubHTTPError, HFValidationError):
            pass
        except Exception:  # offline mode, or whatever the transport raises: no name server, no route, a time-out
            return
        answers.append(True)

    # One request tries each of the hub's addresses in turn; the thread bounds them together.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return bool(answers)
