"""What training put into a model: every measure on its weights, and on random ones of the same architecture.

Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5 and figures 7 and 10: a ViT learns low-dimensional filters, positions
that tell near from far, and both local and global heads. Adebayo et al. 2018, arXiv:1810.03292: what does not change when
weights are random says nothing of what a model has learned. As published here: by training the range of the heads' distances at
least doubles, the low frequencies' part of the filters and the similarity of neighbours' positions rise by 0.1 or more, and the
two rollout maps of a photograph correlate below 0.5 (median); of a model without one of these, the others. Random weights are
those of `vit_probe.random_weights`; the bundled model's training began with other ones, which its card tells of.

    python -m analyses.trained_vs_random --model demo
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import typer

from analyses.study import Finding, keep
from vit_probe import steps, terminal
from vit_probe.measures.map_statistics import map_correlation
from vit_probe.measures.overview import Overview, overview
from vit_probe.options import Formats, ImagePaths, Limit, Model, Out
from vit_probe.plots.comparison import plot_comparison
from vit_probe.random_weights import random_weights

SEED = 0  # of the random weights

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Model = "demo", images: ImagePaths = None, out: Out = Path("figures"), limit: Limit = 128, format: Formats = None
) -> None:
    """Draws every measure of a model, and of the same architecture with random weights."""
    folder, formats, photographs = steps.prepare(images, None, out, limit, format)
    loaded = steps.load(model)
    both = {"trained": overview(loaded, photographs), "random": overview(random_weights(loaded, seed=SEED), photographs)}
    trained, random = (found.numbers().rename(columns={"value": name}) for name, found in both.items())
    table = trained.merge(random, on=["measure", "number", "unit"], validate="one_to_one")
    figure = plot_comparison({name: found.panels() for name, found in both.items()}, columns=4)
    provenance = {name: found.results["attention_distance"].provenance for name, found in both.items()} | {"seed": SEED}
    finding = _finding(table, both["trained"], both["random"])
    keep("trained_vs_random", figure, table, finding, provenance, folder, formats)


def _finding(table: pd.DataFrame, trained: Overview, random: Overview) -> Finding:
    numbers = {(measure, number): values for measure, number, _, *values in table.itertuples(index=False)}
    far, broad = (numbers[name, "range of heads"] for name in ("attention_distance", "attention_entropy"))
    text = (
        f"Training changed the range of the heads' distances from {far[1]:.1f} to {far[0]:.1f} px, and that of their "
        f"entropies from {broad[1]:.2f} to {broad[0]:.2f} nats"
    )
    holds = [far[0] >= 2 * far[1]]
    for what, place in {
        "the low frequencies' part of the filters": ("patch_filters", "low frequencies"),
        "the similarity of neighbours' positions": ("position_similarity", "neighbours"),
    }.items():
        after, before = numbers.get(place, (np.nan, np.nan))
        if np.isfinite([after, before]).all() and after != before:  # alike where a table of positions is not learned
            text += f", {what} from {before:.2f} to {after:.2f}"
            holds.append(after >= before + 0.1)
    rollouts: list[Any] = [found.results["rollout"] for found in (trained, random) if "rollout" in found.results]
    if len(rollouts) == 2:
        alike = float(np.nanmedian(map_correlation(rollouts[0].maps, rollouts[1].maps)))
        text += f". The two rollout maps of a photograph correlate at {alike:.2f} (median)"
        holds.append(alike < 0.5)
    return Finding(f"{text}.", holds=bool(all(holds)))


if __name__ == "__main__":
    terminal.run(app)
