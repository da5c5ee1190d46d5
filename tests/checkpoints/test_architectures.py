"""What names tell, against every architecture of timm that its VisionTransformer builds."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch

from vit_probe.checkpoints.architectures import is_published
from vit_probe.checkpoints.timm import from_state_dict
from vit_probe.errors import UnsupportedArchitecture
from vit_probe.models.vit import VisionTransformer

timm = pytest.importorskip("timm")

from timm.models.vision_transformer import ResPostBlock  # noqa: E402

ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "swiglu"}


def _architectures() -> list[str]:
    """Return one name per family: those that differ in the image size alone are built from the same arguments."""
    names = [name for module in ("vision_transformer", "deit") for name in timm.list_models(module=module)]
    return list({re.sub(r"_\d{3}$", "", name): name for name in names}.values())


def _fits(config: Any, theirs: Any) -> bool:
    with torch.device("meta"):
        return set(VisionTransformer(config).state_dict()) == set(theirs.state_dict())


def test_a_published_name_tells_what_shapes_do_not() -> None:
    covered = 0
    for name in _architectures():
        with torch.device("meta"):
            theirs: Any = timm.create_model(name, depth=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                config = from_state_dict(theirs.state_dict(), {}, name=f"weights/{name}.some_tag.pth").config
            except UnsupportedArchitecture:
                continue
        if not _fits(config, theirs):
            continue
        covered += 1
        block = theirs.blocks[0]
        assert not isinstance(block, ResPostBlock), name
        expected = block.attn.num_heads, ACTIVATIONS[type(block.mlp.act).__name__], block.norm1.eps
        assert (config.num_heads, config.activation, config.norm_eps) == expected, name
        # The names of CLIP's architectures do not say for sure with which GELU the weights were trained.
        assert bool(caught) == ("_clip_" in name and "quickgelu" not in name) or not is_published(name), name
    assert covered > 60
