"""Similarity of the representations of all layers (linear CKA), within two models and between them.

Published (Raghu et al. 2021, Do Vision Transformers See Like Convolutional Neural Networks?, arXiv:2108.08810, figures 1 and
2): the representations of a ViT are similar throughout its depth, in lower and higher layers, whereas those of a ResNet fall
into stages. Criterion used here: the CKA of a layer in the lower half with one in the upper half is above 0.5 on average. The
contrast with a ResNet stays open, because none is measured. Random weights are reported for comparison: their layers are
similar throughout, too, because each changes its input only a little.

    python -m analyses.representation_similarity --model demo --other analyses/snapshots/epoch-016.safetensors

The sample photographs are crops of only three pictures, so that the differences between these three dominate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from analyses.study import Finding, keep
from vit_probe import load_model
from vit_probe.cli.study import StudyOptions, load, run_study
from vit_probe.measures.representation_similarity import RepresentationSimilarity, check_same_images
from vit_probe.models.reinitialize import random_weights
from vit_probe.plots.representation_similarity import SimilarityPanel, plot_representation_similarities
from vit_probe.runner.run import AttentionRun

OTHER = Path(__file__).parent / "snapshots" / "epoch-016.safetensors"
SIMILAR = 0.5
SEED = 0  # of the random weights


def main(
    options: StudyOptions,
    other: Annotated[str, typer.Option(help="Another model; named in the same way as --model.")] = str(OTHER),
) -> None:
    """Draw the similarity of all pairs of layers of a model, of another one, and between the two."""
    model, photographs = load(options)
    networks = [model, load_model(other), random_weights(model, seed=SEED)]
    runs = [AttentionRun(network, photographs) for network in networks]
    measures = [RepresentationSimilarity(run.layers, keep=True) for run in runs]
    for run, measure in zip(runs, measures, strict=True):
        run.observe(measure)
    check_same_images(*runs[:2])
    mine, theirs, random = measures
    results = {"model": mine.compute(), "other": theirs.compute(), "between": mine.compute(other=theirs)}
    names = [Path(one).name.removesuffix(".safetensors") for one in (options.model, other)]
    names = [f"{name} ({which})" for name, which in zip(names, results, strict=False)] if names[0] == names[1] else names
    drawn = [SimilarityPanel(one.similarity, title) for one, title in zip(results.values(), names, strict=False)]
    labels = {"ylabel": f"Layer of {names[0]}", "xlabel": f"Layer of {names[1]}"}
    drawn.append(SimilarityPanel(results["between"].similarity, "between the two", **labels))
    table = pd.concat([one.to_dataframe().assign(models=which) for which, one in results.items()])
    provenance = {which: run.provenance(mine.options) for which, run in zip(("model", "other", "random"), runs, strict=True)}
    finding = found(results["model"].similarity, results["between"].similarity, random.compute().similarity)
    keep("representation_similarity", plot_representation_similarities(drawn), table, finding, provenance, options)


def found(within: np.ndarray, between: np.ndarray, random: np.ndarray) -> Finding:
    """The finding, from the similarities within the model, with another one, and within the model with random weights."""
    half = max(len(within) // 2, 1)
    across, untrained = (one[:half, -half:].mean() for one in (within, random))
    place, most_similar = np.linspace(0, 1, len(between)), between.argmax(axis=1) / max(between.shape[1] - 1, 1)
    away = np.abs(place - most_similar).mean()
    text = (
        f"The CKA of a layer in the lower half with one in the upper half is {across:.2f} on average (with random weights "
        f"{untrained:.2f}); that of the first with the last layer is {within[0, -1]:.2f}, and the lowest of all pairs is "
        f"{within.min():.2f}. The layer of the other model that is most similar to a layer lies {away:.0%} of the depth away "
        f"from its position, and has a CKA of {between.max(axis=1).mean():.2f} with it, on average."
    )
    published = {
        "lower and upper layers are similar (CKA above 0.5)": bool(across > SIMILAR) if len(within) > 1 else None,
        "more similar than those of a convolutional network": None,
    }
    return Finding(text, published)


if __name__ == "__main__":
    run_study(main)
