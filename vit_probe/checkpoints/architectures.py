"""What the name of an architecture, or of a file, tells about a model while its parameters do not."""

from __future__ import annotations

import re
from typing import Any

from vit_probe.errors import UnsupportedArchitecture

__all__ = ["fields_from_name", "is_published", "trained_with_quick_gelu"]

# Names of timm, built from words whose meaning is known here; then files of DINO, DINOv2 and MAE. With a word that is not
# listed, a model may compute something new, and what is usual for its shapes remains an assumption.
_WORDS = r"patch\d+|\d+|plus|clip|quickgelu|siglip|gap|reg\d|dinov2|tipsv2|distilled|miil|in21k|36x1|r26|r50|r|s\d+|p\d+"
_PUBLISHED = (
    rf"(vit|deit3?|eva|flexivit)_[a-z0-9]+(_({_WORDS}))*|test_vit2?"
    r"|dino(v2)?_(vit|deit)[a-z]+\d+(_reg4)?_pretrain|mae_pretrain_vit_[a-z]+"
)
_FIELDS: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"quick[_-]?gelu", {"activation": "quick_gelu"}),
    (r"^vit_(giantopt|so400m_patch16_siglip|large_patch16_siglip(_gap)?_512|base_patch32_siglip)", {"activation": "gelu_tanh"}),
    (r"^vit_base_patch16_gap_", {"num_heads": 16}),
    (r"^test_vit2?$", {"num_heads": 2}),
)
# Architectures whose parameters would fit, but which compute something else with them.
_UNSUPPORTED = ((r"^vit_\w+_rpn(_|$)", "layer norms after the residual branches"),)


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

    Examples:
        >>> trained_with_quick_gelu("vit_base_patch16_clip_224.openai"), trained_with_quick_gelu("vit_base_patch16_clip_224")
        (True, False)
    """
    return bool(re.search(r"openai|metaclip_(400m|2pt5b)|dfn5b", name)) and "_ft_" not in name


def _architectures(name: str) -> list[str]:
    return [re.split(r"\.|-[0-9a-f]{8}\b", part.lower())[0] for part in name.split("/")]
