"""Downloading checkpoints from the Hugging Face hub, through its own client and cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from vit_probe.checkpoints.import_library import import_library, suggest_similar
from vit_probe.errors import InputError

__all__ = ["LIBRARY_FILES", "OPEN_CLIP_FILES", "PREFIXES", "FilePatterns", "fetch", "similar_timm_models"]

PREFIXES = ("hf:", "timm:")

_TIMEOUT = 15.0  # seconds


@dataclass(frozen=True)
class FilePatterns:
    """Glob patterns of the files to download.

    Args:
        configuration: Configuration files.
        safetensors: Weights as safetensors.
        pickles: Pickled weights, downloaded only if there are no safetensors.
    """

    configuration: tuple[str, ...]
    safetensors: tuple[str, ...]
    pickles: tuple[str, ...]


LIBRARY_FILES = FilePatterns(
    ("config.json", "preprocessor_config.json", "processor_config.json"),
    ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"),
)
"""Files of timm's and transformers' repositories."""
OPEN_CLIP_FILES = FilePatterns(("open_clip_config.json",), ("open_clip_model.safetensors",), ("open_clip_pytorch_model.bin",))


def fetch(name: str, files: FilePatterns = LIBRARY_FILES) -> Path:
    """Return the local folder of a model's files, downloaded unless they are cached.

    Only configurations and PyTorch weights are downloaded. If the hub cannot be reached, the cached files are used.

    Args:
        name: `hf:ORG/NAME`, or `timm:NAME` for the repository `timm/NAME`.
        files: Which files to download.

    Raises:
        InputError: If the client is not installed, the repository does not exist or access is denied, or the hub cannot be
            reached and there is no cached copy.
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
    invalid_name = InputError(f"{name} is not the name of a model on the hub; write hf:ORG/NAME or timm:NAME")
    if repository.count("/") != 1:
        raise invalid_name
    try:
        offline = not _hub_responds(repository)
        for weights in (files.safetensors, files.pickles):
            patterns = [*files.configuration, *weights]
            folder = Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=offline))
            if any(any(folder.glob(pattern)) for pattern in weights):
                break
        return folder
    except HFValidationError:
        raise invalid_name from None
    except GatedRepoError:
        raise InputError(
            f"{name} is only for users who accepted its terms; accept them at https://huggingface.co/{repository}, then "
            "log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        similar = similar_timm_models(repository.removeprefix("timm/")) if source == "timm" else ""
        raise InputError(f"the hub has no repository {repository}, or it is private; check the name{similar}") from None
    except IncompleteSnapshotError:
        raise InputError(
            f"the cached copy of {repository} is incomplete, and the hub cannot be reached; check the network and try again"
        ) from None
    except LocalEntryNotFoundError:
        raise InputError(
            f"{repository} is not in the local cache, and the hub cannot be reached; check the network, or pass a local folder"
        ) from None
    except Exception as error:  # the client does not wrap its transport's exceptions: proxies, certificates, time-outs
        message = str(error).partition("\n")[0]
        raise InputError(f"{repository} cannot be fetched from the hub ({type(error).__name__}: {message})") from None


def _hub_responds(repository: str) -> bool:
    """Return whether the hub responds within `_TIMEOUT` seconds, even if only to say that there is no such repository.

    `snapshot_download` has no overall time limit: it would wait for minutes on a network that drops packets.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    responses: list[bool] = []

    def request() -> None:
        try:
            HfApi().repo_info(repository, timeout=_TIMEOUT)
        except (HfHubHTTPError, HFValidationError):
            pass
        except Exception:  # offline mode, or whatever the transport raises: no name server, no route, a time-out
            return
        responses.append(True)

    # One request tries each of the hub's addresses in turn, each with the full timeout; the thread limits the total.
    thread = Thread(target=request, daemon=True)
    thread.start()
    thread.join(_TIMEOUT)
    return bool(responses)


def similar_timm_models(name: str) -> str:
    """Return the end of an error message that lists timm's pretrained models with similar names; empty without timm."""
    try:
        timm = import_library("timm", name)
    except InputError:
        return ""
    return suggest_similar(name, timm.list_models(pretrained=True))
