"""Loading timm's own models, from folders in its hub layout."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vit_probe.checkpoints.files import read_folder
from vit_probe.checkpoints.import_library import import_library, one_line, suggest_similar
from vit_probe.checkpoints.libraries import finish_model
from vit_probe.checkpoints.timm import preprocessing_from_config
from vit_probe.errors import InputError

__all__ = ["load_folder"]


def load_folder(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    """Load timm's model with the folder's weights and timm's preprocessing for it.

    Its attention is fused wherever timm can, including where timm calls that experimental (Swin), because attention is
    captured in the fused function. If fused attention was switched off in timm, it stays off.

    Args:
        folder: A folder written by `timm.models.save_for_hf`, with `config.json` and weights.
        config: Content of `config.json`.

    Raises:
        InputError: If timm is not installed or has no such architecture, or the weights do not fit it.
    """
    architecture = str(config["architecture"])
    timm = import_library("timm", f"the architecture {architecture}")
    if not timm.is_model(architecture):
        similar = suggest_similar(architecture, timm.list_models())
        raise InputError(f"timm {timm.__version__} has no architecture {architecture}{similar}; a newer timm may have it")
    with _collect_missing_parameters() as missing, _fused_attention(timm):
        try:
            _check_size(timm, folder)
            model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        except Exception as error:  # whatever a file's content makes timm or torch raise
            raise InputError(f"the weights do not load into {architecture}: {one_line(error)}") from None
    if missing:
        raise InputError(f"the weights are incomplete for {architecture}: {'; '.join(missing)}")
    return finish_model(model, preprocessing_from_config(timm.data.resolve_model_data_config(model)))


def _check_size(timm: Any, folder: Path) -> None:
    """Check that the configured model is not far larger than its weights, before memory is taken for it.

    It may be somewhat larger, because timm interpolates position tables.
    """
    with torch.device("meta"):
        planned = sum(
            parameter.numel() for parameter in timm.create_model(f"local-dir:{folder}", pretrained=False).parameters()
        )
    held = sum(tensor.numel() for tensor in read_folder(folder).values())
    if planned > 4 * held:
        raise ValueError(f"config.json describes a model of {planned} parameters, but the weights hold {held}")


@contextmanager
def _fused_attention(timm: Any) -> Iterator[None]:
    """Enable fused attention where timm calls it experimental, unless fused attention is switched off altogether."""
    enabled, experimental = timm.layers.use_fused_attn(), timm.layers.use_fused_attn(experimental=True)
    timm.layers.set_fused_attn(enabled, experimental=True)
    try:
        yield
    finally:
        timm.layers.set_fused_attn(enabled, experimental=experimental)


@contextmanager
def _collect_missing_parameters() -> Iterator[list[str]]:
    """Collect timm's log messages about parameters that no file held and that therefore kept random values.

    For some architectures, and where numbers of classes differ, timm loads leniently and only logs what is missing, at a
    level that is not shown.
    """
    messages: list[str] = []
    logger = logging.getLogger("timm.models._builder")
    level, effective_level = logger.level, logger.getEffectiveLevel()

    def collect(record: logging.LogRecord) -> bool:
        if record.getMessage().startswith("Missing keys"):
            messages.append(record.getMessage().partition(" discovered")[0])
        return record.levelno >= effective_level  # the user still sees only what the logger's own level shows

    logger.addFilter(collect)
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.setLevel(level)
        logger.removeFilter(collect)
