"""What training put into a model: every measure on its weights, and on random ones of the same architecture.

Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5 and figures 7 and 10: a ViT learns low-dimensional filters, positions
that tell near from far, and both local and global heads. Adebayo et al. 2018, arXiv:1810.03292: what does not change when
weights are random says nothing of what a model has learned. As published here: by training the range of the heads' distances at
least doubles, so does what the largest value of a rollout map is above its mean (of two drawings of random weights the maps
differ, too), and the low frequencies' part of the filters and the similarity of neighbours' positions rise by 0.1 or more; of a
model without one of these, the others. Random weights are
those of `vit_probe.models.reinitialize`; the bundled model's training began with other ones, which its card tells of.

    python -m analyses.trained_vs_random --model demo
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analyses.study import Finding, keep
from vit_probe.cli import console as terminal
from vit_probe.cli import setup as steps
from vit_probe.cli.options import Formats, ImagePaths, Limit, Model, Out
from vit_probe.measures.map_statistics import map_correlation
from vit_probe.measures.overview import overview
from vit_probe.models.reinitialize import random_weights
from vit_probe.plots.comparison import plot_comparison

SEED = 0  # of the random weights


def main(
    model: Model = "demo", images: ImagePaths = None, out: Out = Path("figures"), limit: Limit = 128, format: Formats = None
) -> None:
    """Draws every measure of a model, and of the same architecture with random weights."""
    folder, formats, photographs = steps.prepare(images, None, out, limit, format)
    loaded = steps.load(model)
    both = {"trained": overview(loaded, photographs), "random": overview(random_weights(loaded, seed=SEED), photographs)}
    trained, random = (one.numbers().rename(columns={"value": name}) for name, one in both.items())
    table = trained.merge(random, on=["measure", "number", "unit"], validate="one_to_one")
    figure = plot_comparison({name: one.panels() for name, one in both.items()}, columns=4)
    provenance = {name: one.results["attention_distance"].provenance for name, one in both.items()} | {"seed": SEED}
    rollouts: list[Any] = [one.results["rollout"] for one in both.values() if "rollout" in one.results]
    alike = float(np.nanmedian(map_correlation(*(one.maps for one in rollouts)))) if len(rollouts) == 2 else None
    for name, reason in (both["trained"].left_out | both["random"].left_out).items():
        terminal.complain(f"note: {name} is left out: {reason}")
    keep("trained_vs_random", figure, table, found(table, alike), provenance, folder, formats)


def found(table: pd.DataFrame, alike: float | None) -> Finding:
    """Of the table of numbers, and the correlation of the rollout maps of a photograph, where both have them."""
    numbers = {(measure, number): values for measure, number, _, *values in table.itertuples(index=False)}
    far, broad = (numbers[name, "range of heads"] for name in ("attention_distance", "attention_entropy"))
    text = (
        f"Training changed the range of the heads' distances from {far[1]:.1f} to {far[0]:.1f} px, and that of their "
        f"entropies from {broad[1]:.2f} to {broad[0]:.2f} nats"
    )
    wider = bool(far[0] >= 2 * far[1]) if far[0] > 0 else None
    published: dict[str, bool | None] = {"the range of the heads' distances doubles": wider}
    for what, place in {
        "the low frequencies' part of the filters": ("patch_filters", "low frequencies"),
        "the similarity of neighbours' positions": ("position_similarity", "neighbours"),
    }.items():
        after, before = numbers.get(place, (np.nan, np.nan))
        if np.isfinite([after, before]).all() and after != before:  # alike where a table of positions is not learned
            text += f", {what} from {before:.2f} to {after:.2f}"
            published[f"{what} rises by 0.1"] = bool(after >= before + 0.1)
    if alike is not None and np.isfinite(alike):
        more = numbers["rollout", "largest over mean"]
        text += f". The two rollout maps of a photograph correlate at {alike:.2f} (median); the largest value of one is "
        text += f"{more[0]:.2f} times its mean, with random weights {more[1]:.2f} times"
        published["rollout is less even (largest value over mean)"] = bool(more[0] - 1 >= 2 * (more[1] - 1))
    return Finding(f"{text}.", published)


if __name__ == "__main__":
    terminal.run(main)
