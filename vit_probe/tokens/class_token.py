"""Which token is the class token: told from what the model's pooled output depends on, else from the model's parameters.

A position alone tells nothing, since registers may stand before the class token or instead of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from vit_probe.tokens.identity_attention import IdentityAttentionProbe

__all__ = ["find_class_token"]

# A token that is pooled together with the patches has about the same influence as each of them; a class token far more.
_MIN_INFLUENCE = 3.0  # relative to the most influential patch
_CLASS_TOKEN = re.compile(r"(^|[._])(cls|class)(_?tok(en)?s?|_?embed(ding)?)?$")


def find_class_token(
    model: nn.Module, probe: IdentityAttentionProbe, layer: int, patch_tokens: slice
) -> tuple[bool | None, int | None]:
    """Return whether a model has a class token (None if unknown), and its place among the tokens.

    The class token is the only token besides the patches on which the pooled output depends. Where that does not decide, since
    the model returns all tokens or averages those of several heads, it is the token that a parameter with a class token's name
    makes up.

    Args:
        model: In evaluation mode.
        probe: After `small_changes` with `follow`.
        layer: A layer over all tokens.
        patch_tokens: Which of them are patches.
    """
    num_tokens = probe.noise_codes[layer].shape[1]
    others = [token for token in range(num_tokens) if not patch_tokens.start <= token < patch_tokens.stop]
    if not others:
        return False, None
    influence = probe.influence
    used: Sequence[int] = []
    if influence is not None and len(influence) == num_tokens:
        of_patches = float(influence[patch_tokens].max())
        used = [token for token in others if influence[token] > max(_MIN_INFLUENCE * of_patches, 0)]
        if len(used) == 1:
            return True, used[0]
    named = _named_token(model, probe, layer)
    if named in others and (not used or named in used):
        return True, named
    if named is None and influence is not None and influence[patch_tokens].any() and not influence[others].any():
        return False, None  # the output is pooled from the patches alone
    return None, None


def _named_token(model: nn.Module, probe: IdentityAttentionProbe, layer: int) -> int | None:
    """Return the only token that changes with the parameters that have a class token's name; None if there is none."""
    changed = {
        name: value + torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
        for name, value in model.named_parameters()
        if _CLASS_TOKEN.search(name)
    }
    if not changed:
        return None
    try:
        codes = probe.codes_of_noise(lambda images: functional_call(model, changed, (images,)), layer)
    except (RuntimeError, TypeError, ValueError):  # models whose parameters cannot be replaced, such as graphs
        return None
    tokens: Float[Tensor, "token"] = (codes[layer] - probe.noise_codes[layer]).abs().amax(dim=-1)[0]
    places = (tokens > 1e-3 * tokens.max()).nonzero().flatten().tolist()
    return places[0] if len(places) == 1 else None
