"""Suggesting what was meant by a name that is neither a file nor begins with one of the known sources."""

from __future__ import annotations

import re
from difflib import get_close_matches

__all__ = ["suggest_source"]

_SOURCES = {
    "hf": "hf", "hf-hub": "hf", "hf_hub": "hf", "hub": "hf", "huggingface": "hf", "hugging-face": "hf", "transformers": "hf",
    "timm": "timm", "torchvision": "torchvision",
    "open_clip": "open_clip", "open-clip": "open_clip", "openclip": "open_clip",
}  # fmt: skip
_WEIGHTS_SUFFIX = r"\.(npz|safetensors|pth?|bin|ckpt|tar|onnx|h5)$"
# How the libraries spell the names of their models.
_HUB_ADDRESS = r"(https?:/+)?(www\.)?(huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(/.*)?"
_OPEN_CLIP = r"((?:ViT|RN|EVA|PE|CoCa|coca|NLLB|MobileCLIP|ViTamin)[\w-]*-[\w-]*\d[\w-]*)(/[\w.-]+)?"
_OPENAI_CLIP = r"ViT-([A-Z])/(\d+)(@336px)?"  # OpenAI's own names, which are also the ViT paper's
_TORCHVISION = r"(vit_[blh]_\d+|swin(_v2)?_[tsb]|maxvit_t|resnet\d+)(\.[A-Z0-9_]+)?"
_TIMM = r"[a-z]+[a-z0-9]*(_[a-z0-9]+)+(\.[a-z0-9_]+)?"
_TORCH_HUB = r"(dino|dinov2)_vit([sblg])(8|14|16)(_reg)?"
_DINO_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}
_HUB = r"[\w.-]+/[\w.-]+"


def suggest_source(name: str) -> str | None:
    """Return the name that was probably meant by one without a source, or with a misspelt one; None for any other string.

    Examples:
        >>> suggest_source("facebook/dinov2-small"), suggest_source("torchvison:vit_b_16"), suggest_source("model.pth")
        ('hf:facebook/dinov2-small', 'torchvision:vit_b_16', None)
    """
    if address := re.fullmatch(_HUB_ADDRESS, name):
        return f"hf:{address[4]}"
    source, separator, rest = re.match(r"([^:/]*)([:/]/*)?(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
    word = source.lower()
    # A colon always follows a source; a slash may also follow a folder or an organisation whose name only resembles one.
    known = [word] if word in _SOURCES else get_close_matches(word, _SOURCES, 1, 0.75) if separator == ":" else []
    if known and rest:
        return f"{_SOURCES[known[0]]}:{rest}"
    if re.search(_WEIGHTS_SUFFIX, name) or name.startswith((".", "/", "~")):
        return None
    if clip := re.fullmatch(_OPENAI_CLIP, name):
        return f"open_clip:ViT-{clip[1]}-{clip[2]}{'-336' if clip[3] else ''}/openai"
    if clip := re.fullmatch(_OPEN_CLIP, name):
        return f"open_clip:{clip[1]}{clip[2] or '/TAG'}"
    if dino := re.fullmatch(_TORCH_HUB, name):
        registers = "-with-registers" if dino[4] else ""
        size = f"vit{dino[2]}{dino[3]}" if dino[1] == "dino" else _DINO_SIZES[dino[2]]
        return f"hf:facebook/{dino[1]}{registers}-{size}"
    if re.fullmatch(_TORCHVISION, name):
        return f"torchvision:{name}"
    if re.fullmatch(_TIMM, name):
        return f"timm:{name}"
    if re.fullmatch(_HUB, name):
        return f"hf:{name}"
    return f"hf:ORG/{name}" if re.fullmatch(r"[a-z0-9]+(-[a-z0-9.]+)+", name) else None
