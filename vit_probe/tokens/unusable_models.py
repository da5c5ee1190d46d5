"""Why a model cannot be run on images: sentences that say what to pass instead."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import nn

from vit_probe.attention.wrappers import unwrap
from vit_probe.errors import InputError
from vit_probe.tokens.identity_attention import IdentityAttentionProbe
from vit_probe.tokens.patch_embedding import first_convolution

__all__ = ["explain_failure"]


def explain_failure(model: nn.Module, size: tuple[int, int], channels: int | None, error: Exception) -> InputError:
    """Return what to tell the user about a model that raised `error` when it was called with an image.

    Args:
        model: In evaluation mode, without gradients.
        size: Height and width of the image in pixels.
        channels: Number of its channels; that of the model's first convolution if None.
        error: What the model raised.
    """
    name = type(model).__name__
    reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
    if isinstance(model, torch.jit.ScriptModule):
        return InputError(f"{name} is TorchScript, whose attention cannot be seen ({reason}); pass the original model")
    if takes_videos(model):
        return InputError(f"{name} takes videos, several frames at a time ({reason}); pass a model of single images")
    _, convolution = first_convolution(model)
    if convolution is not None and channels not in (None, convolution.in_channels):
        return InputError(
            f"{name} takes images of {_channels(convolution.in_channels)}, but these have {channels} ({reason}); convert the "
            "images, or pass a model of such images"
        )
    if (path := _image_tower(model, size, channels)) is not None:
        tower = type(model.get_submodule(path)).__name__
        return InputError(
            f"{name} cannot be called with these images alone ({reason}), but a part of it can: pass model.{path} (a {tower})"
        )
    if isinstance(error, AssertionError | RuntimeError | ValueError):  # what libraries raise for images of the wrong size
        return InputError(
            f"{name} cannot take images of {size[0]} x {size[1]} pixels ({reason}); pass images of the size that it was made "
            "for"
        )
    return InputError(
        f"{name} cannot be called with images alone ({type(error).__name__}: {reason}); pass a module whose forward takes a "
        "batch of images"
    )


def takes_videos(model: nn.Module) -> bool:
    """Return whether a model's patches extend over several frames."""
    config = getattr(unwrap(model), "config", None)
    is_configured = any(getattr(config, name, None) is not None for name in ("num_frames", "tubelet_size"))
    return is_configured or any(isinstance(module, nn.Conv3d) for module in model.modules())


def _channels(count: int) -> str:
    return f"{count} channel" if count == 1 else f"{count} channels"


def _image_tower(model: nn.Module, size: tuple[int, int], channels: int | None) -> str | None:
    """Return the path of the largest part of a model that takes images alone and has attention; None if there is none."""
    stem, _ = first_convolution(model)
    parts = stem.split(".")[:-1]
    for length in range(1, len(parts) + 1):
        path = ".".join(parts[:length])
        # Parts raise all kinds of errors when they are given something other than what they expect.
        with suppress(Exception), torch.no_grad():
            probe = IdentityAttentionProbe(model.get_submodule(path), *size, channels)
            probe.probe_noise()
            if probe.layers:
                return path
    return None
