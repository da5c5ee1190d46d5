"""What the name of an architecture, or of a file, tells about a model while its parameters do not."""

from __future__ import annotations

import re
from typing import Any

from vit_probe.errors import UnsupportedArchitecture

__all__ = ["fields_from_name", "is_another_family", "is_published", "is_timm_name", "trained_with_quick_gelu"]

_SIZES = (
    "tiny|xsmall|small|base|large|huge|giant|giantopt|gigantic|wee|pwee|dwee|dpwee|little|dlittle|medium|mediumd|betwixt"
    "|so150m2?|so400m|intern300m"
)
# How timm's names of Vision Transformers begin. Others call models of their own `vit_mine`, or MoCo v3's with 12 heads
# `vit_small`: without the size of the patches, a name tells nothing.
_TIMM = (
    rf"vit_({_SIZES})_(patch\d+|r\d*_s\d+)|deit3?_({_SIZES})_(distilled_)?patch\d+|eva_large_patch14"
    r"|flexivit_(small|base|large)|test_vit\d?"
)
# Words that may follow, and whose meaning is known here. With one that is not listed, a model may compute something new, and
# what is usual for its shapes remains an assumption.
_WORDS = r"\d+|plus|clip|quickgelu|siglip|gap|reg\d|dinov2|tipsv2|miil|in21k|36x1|p\d+"
# Names of timm in full, which end with an image size or a method of training; then files of DINO, DINOv2 and MAE.
_PUBLISHED = (
    rf"(?=flexivit|test_vit2?$|.*_(\d{{3}}|dinov2|tipsv2)(_|$))({_TIMM})(_({_WORDS}))*"
    r"|dino_(deitsmall|vitbase)\d+_pretrain|dinov2_vit[sblg]14(_reg4)?_pretrain|mae_pretrain_vit_(base|large|huge)"
)
_FIELDS: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"quick[_-]?gelu", {"activation": "quick_gelu"}),
    (r"^vit_(giantopt|so400m_patch16_siglip|large_patch16_siglip(_gap)?_512|base_patch32_siglip)", {"activation": "gelu_tanh"}),
    (r"^vit_base_patch16_gap_", {"num_heads": 16}),
    (r"^test_vit2?$", {"num_heads": 2}),
)
# timm's families that VisionTransformer covers, and words of their names that tell of rotary or relative positions.
_FAMILIES = r"(test_)?(vit|deit3?|flexivit|eva)\d?(_|$)"
_OTHER_POSITIONS = r"_(s?relpos|rope|dinov3|sapiens2|lingbot|pe)(_|$)"
# Architectures whose parameters would fit, but which compute something else with them.
_UNSUPPORTED = ((rf"^({_TIMM})_rpn(_|$)", "layer norms after the residual branches"),)
# Names of CLIP's architectures and weights, in timm and open_clip, that were trained with QuickGELU.
_QUICK_GELU = (
    r"openai|metaclip_(400m|2pt5b|fullcc)|dfn5b|dfn2b(?!_)|patch32.*laion400m_e3[12]|huge_patch14\w*_224.*metaclip2_worldwide"
)


def is_published(name: str) -> bool:
    """Return whether the name is that of a published architecture, which is as usual in what its parameters do not tell.

    Args:
        name: An architecture's name in timm, or the names of a folder and of the file in it (`FOLDER/FILE`); endings (`.pth`),
            tags and hashes are ignored.

    Examples:
        >>> is_published("weights/vit_base_patch16_224.augreg.pth"), is_published("weights/vit_base_mine.pth")
        (True, False)
    """
    return any(re.fullmatch(_PUBLISHED, part) for part in _architectures(name))


def is_timm_name(name: str) -> bool:
    """Return whether the name is spelt as timm spells those of its Vision Transformers, with the size of model and patches.

    Examples:
        >>> is_timm_name("vit_base_patch16_224.augreg"), is_timm_name("vit_base")
        (True, False)
    """
    return bool(re.match(rf"({_TIMM})([_.]|$)", name.lower()))


def is_another_family(architecture: str) -> bool:
    """Return whether an architecture of timm belongs to a family that `VisionTransformer` does not cover.

    Examples:
        >>> is_another_family("vit_tiny_mine"), is_another_family("swin_tiny_patch4_window7_224")
        (False, True)
    """
    return not re.match(_FAMILIES, architecture) or bool(re.search(_OTHER_POSITIONS, architecture))


def fields_from_name(name: str) -> dict[str, Any]:
    """Return the fields of `ViTConfig` in which an architecture differs from what is usual for its shapes.

    Args:
        name: As for `is_published`.

    Raises:
        UnsupportedArchitecture: If `VisionTransformer` does not compute what the architecture does.

    Examples:
        >>> fields_from_name("vit_base_patch16_clip_quickgelu_224.openai.pth")
        {'activation': 'quick_gelu'}
    """
    found: dict[str, Any] = {}
    for architecture in _architectures(name):
        for pattern, feature in _UNSUPPORTED:
            if re.search(pattern, architecture):
                raise UnsupportedArchitecture(f"{architecture} has {feature}, which VisionTransformer does not support")
        for pattern, fields in _FIELDS:
            if re.search(pattern, architecture):
                found |= fields
    return found


def trained_with_quick_gelu(name: str) -> bool:
    """Return whether a name says that a CLIP was trained with QuickGELU, as OpenAI's was, and not fine-tuned since.

    Args:
        name: Of the architecture and the weights, as in `vit_base_patch16_clip_224.openai`.

    Examples:
        >>> trained_with_quick_gelu("vit_base_patch16_clip_224.openai"), trained_with_quick_gelu("vit_base_patch16_clip_224")
        (True, False)
    """
    return bool(re.search(_QUICK_GELU, name)) and "_ft_" not in name


def _architectures(name: str) -> list[str]:
    """Return what may be an architecture: the file's name, and the folder's if it is a name of timm's."""
    *folders, file = (re.split(r"\.|-[0-9a-f]{8}\b", part.lower())[0] for part in name.split("/"))
    return [*filter(is_timm_name, folders), file]
