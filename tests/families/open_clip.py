"""open_clip's families: the image towers of CLIP and CoCa."""

from __future__ import annotations

from functools import partial
from typing import Any

from open_clip.transformer import VisionTransformer

from tests.families import multihead
from tests.families.family import Family, Size, blocks


def tower(**options: Any) -> Any:
    """Return a function that builds a small image tower for images of a size."""
    tiny = dict(patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=16, attn_pooler_heads=2)
    return lambda size: VisionTransformer(image_size=size, **(tiny | options))


_open_clip = partial(
    Family,
    "open_clip",
    unfused=multihead.unfused,
    layers=blocks("transformer.resblocks.{}.attn"),
    sizes=((32, 48), (40, 24), (48, 48)),
)


def _one_query_per_token(size: Size) -> VisionTransformer:
    """The attention pooler has as many queries as tokens, so that its shapes do not distinguish it from self-attention."""
    return tower(attentional_pool=True, attn_pooler_queries=size[0] * size[1] // 64 + 1)(size)


FAMILIES = [
    _open_clip("CLIP", tower()),
    _open_clip("CLIP, LayerScale", tower(ls_init_value=0.1, pool_type="avg", final_ln_after_pool=True), in_readme=False),
    _open_clip(
        "CoCa",
        tower(attentional_pool=True, attn_pooler_queries=7),
        skipped={"attn_pool.attn": "7 queries for {tokens} keys"},
    ),
    _open_clip(
        "CoCa, one query per token",
        _one_query_per_token,
        skipped={"attn_pool.attn": "the queries come from one sequence, the keys from another"},
        in_readme=False,
    ),
]
