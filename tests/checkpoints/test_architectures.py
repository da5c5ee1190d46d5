"""What names tell, against every architecture of timm that its VisionTransformer builds."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch

from vit_probe.checkpoints.architectures import fields_from_name, is_another_family, is_published, trained_with_quick_gelu
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


@pytest.mark.parametrize(
    "name",
    [
        "vit_runs/checkpoint.pth",
        "vit_mine.pth",
        "vit_models/x.pth",
        "vit_small/vit-s-300ep.pth.tar",
        "vit_small_patch16.pth",
        "vit_small_patch16_mine/x.pth",
        "vit_small_patch16_224_mine.pth",
        "deit_3_small_224_1k.pth",
        "mae_pretrain_vit_mine.pth",
    ],
)
def test_other_names_tell_nothing(name: str) -> None:
    assert not is_published(name)
    assert fields_from_name(name) == {}


def test_a_folder_counts_if_it_is_a_name_of_timms() -> None:
    assert is_published("vit_base_patch16_gap_224/checkpoint.pth")
    assert fields_from_name("vit_base_patch16_gap_224/checkpoint.pth") == {"num_heads": 16}
    assert fields_from_name("quickgelu_runs/checkpoint.pth") == {}


def test_other_families() -> None:
    names = ("resnet50", "swin_tiny_patch4_window7_224", "vit_small_patch16_rope_224", "vit_relpos_base_patch16_224")
    assert all(map(is_another_family, (*names, "eva02_tiny_patch14_224", "vit_base_patch16_dinov3")))
    assert not any(map(is_another_family, ("vit_tiny_mine", "deit3_base_patch16_224", "flexivit_base", "test_vit2")))


def test_quick_gelu_is_that_of_open_clips_table() -> None:
    open_clip = pytest.importorskip("open_clip")
    # timm's names of open_clip's architectures; MetaCLIP's `fullcc` is timm's `2pt5b`.
    names = {"ViT-B-32": "vit_base_patch32_clip_224", "ViT-B-16": "vit_base_patch16_clip_224"}
    names |= {"ViT-L-14": "vit_large_patch14_clip_224", "ViT-H-14": "vit_huge_patch14_clip_224"}
    names |= {"ViT-H-14-worldwide": "vit_huge_patch14_clip_224", "ViT-H-14-worldwide-378": "vit_huge_patch14_clip_378"}
    names |= {"ViT-bigG-14": "vit_gigantic_patch14_clip_224", "ViT-bigG-14-worldwide": "vit_gigantic_patch14_clip_224"}
    for architecture, name in names.items():
        for tag in open_clip.list_pretrained_tags_by_model(architecture):
            expected = bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu"))
            timms = {"metaclip_fullcc": "metaclip_2pt5b"}.get(tag, tag)
            assert trained_with_quick_gelu(f"{name}.{timms}") == expected, (architecture, tag)
