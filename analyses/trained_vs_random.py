"""What training changes in a model: eight measures of its weights, and of random weights of the same architecture.

Published: a ViT learns low-dimensional filters, positions that distinguish near from far, and both local and global heads
(Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5 and figures 7 and 10); whatever is the same for random weights says
nothing about what a model has learned (Adebayo et al. 2018, arXiv:1810.03292). Criteria used here, of which those that a model
does not allow are left out:

- the range of attention distances over heads at least doubles;
- the largest value of a rollout map exceeds its mean at least twice as much (the rollout maps of trained and random weights
  need not be compared, as those of two sets of random weights differ, too);
- the share of low frequencies in the filters and the similarity of neighbouring positions rise by 0.1 or more.

The random weights are those of `vit_probe.models.reinitialize`. The training of the bundled model started from others, which
its model card describes.

    python -m analyses.trained_vs_random --model demo
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from analyses.study import Finding, keep
from vit_probe.cli.study import StudyOptions, complain, load, run_study
from vit_probe.measures.map_statistics import map_correlation
from vit_probe.measures.overview import Overview, overview
from vit_probe.models.reinitialize import random_weights
from vit_probe.plots.comparison import plot_comparison

SEED = 0  # of the random weights
MEASURES = (
    "attention_distance",
    "attention_entropy",
    "token_norms",
    "representation_similarity",
    "patch_filters",
    "position_similarity",
    "rollout",
    "class_attention",
)


def main(options: StudyOptions) -> None:
    """Draw the measures of a model and of the same architecture with random weights."""
    model, photographs = load(options)
    networks = {"trained": model, "random": random_weights(model, seed=SEED)}
    both = {name: selected(overview(network, photographs)) for name, network in networks.items()}
    trained, random = (one.numbers().rename(columns={"value": name}) for name, one in both.items())
    table = trained.merge(random, on=["measure", "number", "unit"], validate="one_to_one")
    figure = plot_comparison({name: one.panels() for name, one in both.items()}, columns=4)
    provenance = {name: one.results["attention_distance"].provenance for name, one in both.items()} | {"seed": SEED}
    rollouts: list[Any] = [one.results["rollout"] for one in both.values() if "rollout" in one.results]
    correlation = float(np.nanmedian(map_correlation(*(one.maps for one in rollouts)))) if len(rollouts) == 2 else None
    for name, reason in (both["trained"].left_out | both["random"].left_out).items():
        complain(f"note: {name} is left out: {reason}")
    keep("trained_vs_random", figure, table, found(table, correlation), provenance, options)


def selected(everything: Overview) -> Overview:
    """The part of an overview that this study shows, in its order."""
    results, left_out = (
        {name: values[name] for name in MEASURES if name in values} for values in (everything.results, everything.left_out)
    )
    return Overview(results, left_out)  # type: ignore[arg-type]


def found(table: pd.DataFrame, correlation: float | None) -> Finding:
    """The finding, from the table of numbers, and the correlation of a photograph's rollout maps if both models have them."""
    numbers = {(measure, number): values for measure, number, _, *values in table.itertuples(index=False)}
    distance, entropy = (numbers[name, "range of heads"] for name in ("attention_distance", "attention_entropy"))
    changes = [
        f"the range of attention distances over heads changes from {distance[1]:.1f} to {distance[0]:.1f} px",
        f"the range of their entropies from {entropy[1]:.2f} to {entropy[0]:.2f} nats",
    ]
    doubles = bool(distance[0] >= 2 * distance[1]) if distance[0] > 0 else None
    published: dict[str, bool | None] = {"the range of attention distances over heads doubles": doubles}
    for quantity, place in {
        "the share of low frequencies in the filters": ("patch_filters", "low frequencies"),
        "the similarity of neighbouring positions": ("position_similarity", "neighbours"),
    }.items():
        after, before = numbers.get(place, (np.nan, np.nan))
        if np.isfinite([after, before]).all() and after != before:  # they are equal if positions are not learned
            changes.append(f"{quantity} from {before:.2f} to {after:.2f}")
            published[f"{quantity} rises by 0.1"] = bool(after >= before + 0.1)
    text = f"With training, {', '.join(changes[:-1])} and {changes[-1]}."
    if correlation is not None and np.isfinite(correlation):
        ratio = numbers["rollout", "largest over mean"]
        text += (
            f" The rollout maps of a photograph with trained and with random weights correlate at {correlation:.2f} (median); "
            f"the largest value of a map is {ratio[0]:.2f} times its mean with trained weights, and {ratio[1]:.2f} times with "
            "random ones."
        )
        published["rollout is less uniform (largest value over mean)"] = bool(ratio[0] - 1 >= 2 * (ratio[1] - 1))
    return Finding(text, published)


if __name__ == "__main__":
    run_study(main)
