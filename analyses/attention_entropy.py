"""How many tokens each head spreads its attention over, against depth and against how far it looks.

Xie et al. 2022, arXiv:2205.13543: in a supervised ViT heads of the lower layers attend to few tokens and differ from
each other, those of the higher layers attend broadly and alike; with masked image modelling heads differ in all layers. As
published here: over the heads' means entropy is larger in the last third of the layers than in the first, and the heads of a
layer of the first third differ, both by more than a tenth of uniform attention's entropy (with random weights, by about a
hundredth); those of the last third differ less. The bundled model was trained with labels and by masking. Clark et al. 2019,
arXiv:1906.04341, section 3.3 and figure 4 (BERT), find some broad heads in the lowest layers already; Zhai et al. 2023,
arXiv:2303.06296, entropy near 0 where training becomes unstable.

    python -m analyses.attention_entropy --model demo
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from analyses.study import Finding, in_first_third, in_last_third, keep
from vit_probe.cli import console as terminal
from vit_probe.cli import setup as steps
from vit_probe.cli.options import Formats, ImagePaths, Limit, Model, Out
from vit_probe.measures import AttentionDistance, AttentionEntropy
from vit_probe.measures.head_table import head_table
from vit_probe.plots.attention_entropy import plot_entropy_sheet
from vit_probe.runner.run import AttentionRun

CLEAR = 0.1  # of uniform attention's entropy


def main(
    model: Model = "demo", images: ImagePaths = None, out: Out = Path("figures"), limit: Limit = 128, format: Formats = None
) -> None:
    """Draws the entropy of every head's attention against depth, and against its attention distance."""
    folder, formats, photographs = steps.prepare(images, None, out, limit, format)
    run = AttentionRun(steps.load(model), photographs)
    far, broad = AttentionDistance(run.grid, windows=run.windows), AttentionEntropy(run.grid, windows=run.windows)
    run.observe(far, broad)
    distance = far.compute(run.provenance(far.options))
    table = head_table(distance, broad.compute(run.provenance(broad.options)))
    provenance = run.provenance(far.options | broad.options)
    keep("attention_entropy", plot_entropy_sheet(table), table, found(table), provenance, folder, formats)


def found(table: pd.DataFrame) -> Finding:
    """Of the table of all heads."""
    early, late = table[in_first_third(table)], table[in_last_third(table)]
    mean = [part.entropy.mean() for part in (early, late)]
    spread = [part.groupby("layer").entropy.agg(np.ptp).mean() for part in (early, late)]
    broadest, correlation = (early.entropy / early.uniform_entropy).max(), table.entropy.corr(table.distance)
    text = (
        f"From the first third of the layers to the last the heads' entropy goes from {mean[0]:.2f} to {mean[1]:.2f} nats on "
        f"average (uniform attention: {table.uniform_entropy.iloc[-1]:.2f}), and the range of the heads of a layer from "
        f"{spread[0]:.2f} to {spread[1]:.2f}; the broadest head of the first third has {broadest:.0%} of uniform "
        f"attention's. "
        f"Over all {len(table)} heads entropy correlates with distance at {correlation:.2f}; the sharpest, "
        f"{table.entropy.min():.2f} nats, looks {table.distance.iloc[table.entropy.argmin()]:.1f} px far."
    )
    clear = CLEAR * table.uniform_entropy.iloc[-1]
    several, differ = table.layer.nunique() > 1, bool(spread[0] > clear) if table["head"].nunique() > 1 else None
    rises = bool(mean[1] - mean[0] > clear) if several else None
    published = {
        "entropy is larger in the last third of the layers than in the first": rises,
        "heads of a layer of the first third differ": differ,
        "heads of a layer of the last third differ less": bool(spread[1] < spread[0]) if differ and several else None,
    }
    return Finding(text, published)


if __name__ == "__main__":
    terminal.run(main)
