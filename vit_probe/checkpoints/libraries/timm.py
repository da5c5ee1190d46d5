"""timm's own models, from folders in its hub layout."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from vit_probe.checkpoints import timm as reader
from vit_probe.checkpoints.libraries import adopt, import_library, reason, similar
from vit_probe.errors import InputError

__all__ = ["load_folder", "similar_names"]


def load_folder(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    """timm's model with the folder's weights, and with timm's preprocessing for it.

    Its attention is fused wherever timm can fuse it, also where timm calls that experimental (Swin), unless fused attention
    was switched off: through it attention is seen.

    Args:
        folder: What `timm.models.save_for_hf` writes: `config.json` and weights.
        config: What `config.json` holds.

    Raises:
        InputError: If timm is not installed or has no such architecture, or the weights do not fit it.
    """
    architecture = str(config["architecture"])
    timm = import_library("timm", f"the architecture {architecture}")
    if not timm.is_model(architecture):
        close = similar(architecture, timm.list_models())
        raise InputError(f"timm {timm.__version__} has no architecture {architecture}{close}; a newer timm may have it")
    with _left_out() as missing, _fused_attention(timm):
        try:
            model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        except Exception as error:  # whatever a file's content makes timm or torch raise
            raise InputError(f"it does not load as {architecture}: {reason(error)}") from None
    if missing:
        raise InputError(f"it does not hold all of {architecture}: {'; '.join(missing)}")
    return adopt(model, reader.preprocessing(timm.data.resolve_model_data_config(model)))


def similar_names(name: str) -> str:
    """The end of an error's sentence: timm's pretrained models with names like `name`; empty without timm."""
    try:
        timm = import_library("timm", name)
    except InputError:
        return ""
    return similar(name, timm.list_models(pretrained=True))


@contextmanager
def _fused_attention(timm: Any) -> Iterator[None]:
    used, experimental = timm.layers.use_fused_attn(), timm.layers.use_fused_attn(experimental=True)
    timm.layers.set_fused_attn(used, experimental=True)
    try:
        yield
    finally:
        timm.layers.set_fused_attn(used, experimental=experimental)


@contextmanager
def _left_out() -> Iterator[list[str]]:
    """Collects what timm says of parameters that no file held and that therefore kept random values.

    For some architectures, and where numbers of classes differ, timm loads leniently and only logs it, at a level that is
    not shown.
    """
    said: list[str] = []
    logger = logging.getLogger("timm.models._builder")
    before, shown = logger.level, logger.getEffectiveLevel()

    def collect(record: logging.LogRecord) -> bool:
        if record.getMessage().startswith("Missing keys"):
            said.append(record.getMessage().partition(" discovered")[0])
        return record.levelno >= shown

    logger.addFilter(collect)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.setLevel(before)
        logger.removeFilter(collect)
