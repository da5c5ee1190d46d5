"""Attention entropy of each head against depth and against its attention distance.

Published (Xie et al. 2022, arXiv:2205.13543): in a supervised ViT, the heads of lower layers attend to few tokens and differ
from each other, while those of higher layers attend broadly and are similar; with masked image modelling, heads differ in all
layers. Criteria used here:

- the mean entropy of heads is larger in the last third of the layers than in the first, by more than a tenth of the entropy of
  uniform attention;
- the range of entropy over the heads of a layer in the first third is more than a tenth of it, on average (with random weights,
  both differences are about a hundredth);
- this range is smaller in the last third.

The bundled model was trained with labels and by masking. Clark et al. 2019, arXiv:1906.04341, section 3.3 and figure 4 (BERT),
already find some broad heads in the lowest layers; Zhai et al. 2023, arXiv:2303.06296, find an entropy near 0 where training
becomes unstable.

    python -m analyses.attention_entropy --model demo
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analyses.study import Finding, in_first_third, in_last_third, keep, merged_provenance
from vit_probe import attention_entropy, mean_attention_distance, measure
from vit_probe.cli.study import StudyOptions, load, run_study
from vit_probe.measures.base.per_head import head_table
from vit_probe.plots.attention_entropy import plot_entropy_sheet

CLEAR = 0.1  # of uniform attention's entropy


def main(options: StudyOptions) -> None:
    """Draw the entropy of each head's attention against depth, and against its attention distance."""
    model, photographs = load(options)
    distance, entropy = measure(model, photographs, [mean_attention_distance, attention_entropy])
    table = head_table(distance, entropy)
    provenance = merged_provenance(distance.provenance, entropy.provenance)
    keep("attention_entropy", plot_entropy_sheet(table), table, found(table), provenance, options)


def found(table: pd.DataFrame) -> Finding:
    """The finding, from the table of all heads."""
    early, late = table[in_first_third(table)], table[in_last_third(table)]
    mean = [part.entropy.mean() for part in (early, late)]
    spread = [part.groupby("layer").entropy.agg(np.ptp).mean() for part in (early, late)]
    broadest, correlation = (early.entropy / early.uniform_entropy).max(), table.entropy.corr(table.distance)
    text = (
        f"From the first third of the layers to the last, the mean entropy of heads changes from {mean[0]:.2f} to "
        f"{mean[1]:.2f} nats (uniform attention: {table.uniform_entropy.iloc[-1]:.2f}), and its range over the heads of a "
        f"layer from {spread[0]:.2f} to {spread[1]:.2f}; the broadest head in the first third has {broadest:.0%} of the "
        f"entropy of uniform attention. Over all {len(table)} heads, entropy and distance correlate at {correlation:.2f}; the "
        f"sharpest head, with {table.entropy.min():.2f} nats, has a distance of "
        f"{table.distance.iloc[table.entropy.argmin()]:.1f} px."
    )
    clear = CLEAR * table.uniform_entropy.iloc[-1]
    several, differ = table.layer.nunique() > 1, bool(spread[0] > clear) if table["head"].nunique() > 1 else None
    rises = bool(mean[1] - mean[0] > clear) if several else None
    published = {
        "entropy is larger in the last third of the layers than in the first": rises,
        "the heads of a layer in the first third differ": differ,
        "the heads of a layer in the last third differ less": bool(spread[1] < spread[0]) if differ and several else None,
    }
    return Finding(text, published)


if __name__ == "__main__":
    run_study(main)
