"""Finding attention by what it is made of: modules that hold projections of queries, keys and values."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

__all__ = ["UNSEEN", "unmeasured_attention"]

UNSEEN = (
    "its attention is not a softmax over all pairs of tokens that then multiplies the values, or is computed where it cannot "
    "be seen"
)

# The words of names such as `qkv`, `q_proj`, `to_kv`, `in_proj_weight`, `wq`, `query_key_value`, `projection_query`.
_ROLES = {
    **dict.fromkeys(("q", "wq", "query", "queries"), "q"),
    **dict.fromkeys(("k", "wk", "key", "keys"), "k"),
    **dict.fromkeys(("v", "wv", "value", "values"), "v"),
    **dict.fromkeys(("qk", "wqk"), "qk"),
    **dict.fromkeys(("kv", "wkv"), "kv"),
    **dict.fromkeys(("qkv", "qkvs", "wqkv"), "qkv"),
}
_OTHER_WORDS = {
    *("to", "in", "c", "w", "global", "local", "proj", "projection", "projections"),
    *("conv", "convolution", "dense", "fc", "layer", "lin", "linear"),
}
_WEIGHT = re.compile(r"[._](weight|bias)$")


def unmeasured_attention(model: nn.Module, seen: Collection[str], ran: Collection[str]) -> dict[str, str]:
    """Return the modules that look like attention but are not in `seen`, nor inside nor around a module that is.

    Args:
        model: The model.
        seen: Paths of the modules whose attention was seen.
        ran: Paths of the modules that ran.

    Returns:
        The reason for each module path.

    Examples:
        >>> model = nn.ModuleDict({"encoder": nn.MultiheadAttention(4, 2), "decoder": nn.MultiheadAttention(4, 2)})
        >>> unmeasured_attention(model, seen={"encoder"}, ran={"encoder"})
        {'decoder': 'it did not run'}
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        others = {*seen, *found}
        if not _attends(module) or any(_is_within(path, other) or _is_within(other, path) for other in others):
            continue
        found[path] = UNSEEN if path in ran else "it did not run"
    return found


def _attends(module: nn.Module) -> bool:
    """Return whether a module itself holds projections of queries and keys, or of values beside weights (`attn`) for them."""
    children = [name for name, _ in module.named_children()]
    names = [*children, *(_WEIGHT.sub("", name) for name, _ in module.named_parameters(recurse=False))]
    roles = {role for name in names for role in _roles(name)}
    is_fused = "in_proj" in names  # nn.MultiheadAttention
    is_outlook = "v" in roles and isinstance(getattr(module, "attn", None), nn.Linear)  # VOLO predicts its weights
    return is_fused or is_outlook or {"q", "k"} <= roles


def _roles(name: str) -> str:
    """Return which of `qkv` a parameter or a module of this name projects to; nothing if it is none of these projections."""
    words = [word for word in re.split(r"[_\d]+", name.lower()) if word]
    roles = "".join(_ROLES.get(word, "") for word in words)
    return roles if all(word in _ROLES or word in _OTHER_WORDS for word in words) else ""


def _is_within(path: str, other: str) -> bool:
    return path == other or not other or path.startswith(other + ".")
