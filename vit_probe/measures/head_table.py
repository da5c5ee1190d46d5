"""What is known of every head, in one table."""

from __future__ import annotations

import pandas as pd

from vit_probe.errors import InputError
from vit_probe.measures.attention_distance import AttentionDistanceResult
from vit_probe.measures.attention_entropy import AttentionEntropyResult
from vit_probe.runner.resume import differing

__all__ = ["head_table"]

_SAME = ("model", "images", "preprocessing", "grid", "windows", "skipped")  # of two provenances


def head_table(distance: AttentionDistanceResult, entropy: AttentionEntropyResult) -> pd.DataFrame:
    """Distance and entropy of every head side by side: how far it looks, and how many tokens it looks at.

    Both come of the same pass of the same images through the same model: `AttentionRun.observe` takes both measures at once.

    Returns:
        One row a head: layer, module, head; distance, distance_std, distance_confidence (pixels), patch_mass,
        uniform_distance (pixels), num_windows; entropy, entropy_std, entropy_confidence (nats), prefix_mass, self_mass,
        uniform_entropy (nats); num_images. The columns are those of the two results, where they are explained. `attrs` as in
        their tables.

    Raises:
        InputError: If the results are of different models, layers, heads or images.
    """
    mine, theirs = (
        {
            "layers": result.modules,
            "heads": values.shape,
            "number of images": result.num_images,
            **{name: result.provenance.get(name) for name in _SAME},
        }
        for result, values in ((distance, distance.distance), (entropy, entropy.entropy))
    )
    if names := differing(mine, theirs):
        raise InputError(
            f"distances and entropies that differ in their {names} do not make one table; measure both in one pass "
            "(AttentionRun(model, images).observe(AttentionDistance(...), AttentionEntropy(...)))"
        )
    far, broad = (
        result.to_dataframe().rename(columns={"std": f"{name}_std", "confidence": f"{name}_confidence"})
        for name, result in (("distance", distance), ("entropy", entropy))
    )
    common = [name for name in broad.columns if name in far.columns]
    table = far.merge(broad, on=common, validate="one_to_one")
    table["num_images"] = table.pop("num_images")  # last, as in the tables of each
    table.attrs = far.attrs
    return table
