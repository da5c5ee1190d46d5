"""How alike the representations of layers are, within two models and between them.

Raghu et al. 2021, Do Vision Transformers See Like Convolutional Neural Networks?, arXiv:2108.08810, figures 1 and 2. Expected:
the representations of a ViT are alike throughout its depth, lower layers like higher ones, where a ResNet's fall apart into
stages. As published here: the linear CKA of a layer in the lower half with one in the upper half is above 0.5 on average. The
contrast with a ResNet stays open, as none is measured; and random weights, whose layers pass on nearly what they are given, are
told beside, since they are alike throughout, too.

    python -m analyses.representation_similarity --model demo --other analyses/snapshots/epoch-016.safetensors

The sample photographs are crops of three pictures only, so that the differences between these three count for most.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from analyses.study import Finding, keep
from vit_probe.cli import console as terminal
from vit_probe.cli import setup as steps
from vit_probe.cli.options import Formats, ImagePaths, Limit, Model, Out
from vit_probe.measures.representation_similarity import RepresentationSimilarity, check_same_images
from vit_probe.models.reinitialize import random_weights
from vit_probe.plots.representation_similarity import SimilarityPanel, plot_representation_similarities
from vit_probe.runner.run import AttentionRun

OTHER = Path(__file__).parent / "snapshots" / "epoch-016.safetensors"
ALIKE = 0.5
SEED = 0  # of the random weights


def main(
    model: Model = "demo",
    other: Annotated[str, typer.Option(help="Another model; named as --model names one.")] = str(OTHER),
    images: ImagePaths = None,
    out: Out = Path("figures"),
    limit: Limit = 128,
    format: Formats = None,
) -> None:
    """Draws the similarity of all pairs of layers of a model, of another, and between the two."""
    folder, formats, photographs = steps.prepare(images, None, out, limit, format)
    networks = [steps.load(name) for name in (model, other)]
    runs = [AttentionRun(network, photographs) for network in (*networks, random_weights(networks[0], seed=SEED))]
    measures = [RepresentationSimilarity(run.layers, keep=True) for run in runs]
    for run, measure in zip(runs, measures, strict=True):
        run.observe(measure)
    check_same_images(*runs[:2])
    mine, theirs, random = measures
    results = {"model": mine.compute(), "other": theirs.compute(), "between": mine.compute(other=theirs)}
    names = [Path(one).name.removesuffix(".safetensors") for one in (model, other)]
    names = [f"{name} ({which})" for name, which in zip(names, results, strict=False)] if names[0] == names[1] else names
    drawn = [SimilarityPanel(one.similarity, title) for one, title in zip(results.values(), names, strict=False)]
    labels = {"down": f"Layer of {names[0]}", "across": f"Layer of {names[1]}"}
    drawn.append(SimilarityPanel(results["between"].similarity, "between the two", **labels))
    table = pd.concat([one.to_dataframe().assign(models=which) for which, one in results.items()])
    provenance = {which: run.provenance(mine.options) for which, run in zip(("model", "other", "random"), runs, strict=True)}
    finding = found(results["model"].similarity, results["between"].similarity, random.compute().similarity)
    keep("representation_similarity", plot_representation_similarities(drawn), table, finding, provenance, folder, formats)


def found(within: np.ndarray, between: np.ndarray, random: np.ndarray) -> Finding:
    """Of the similarity within the model, that with another, and within the model with random weights."""
    half = max(len(within) // 2, 1)
    across, untrained = (one[:half, -half:].mean() for one in (within, random))
    place, likest = np.linspace(0, 1, len(between)), between.argmax(axis=1) / max(between.shape[1] - 1, 1)
    away = np.abs(place - likest).mean()
    text = (
        f"A layer of the lower half has a CKA of {across:.2f} with one of the upper half, on average (with "
        f"random weights {untrained:.2f}); the first layer has {within[0, -1]:.2f} with the last, and the least of all pairs "
        f"is {within.min():.2f}. In the other model, the layer that is most like a layer lies {away:.0%} of the depth away "
        f"from its place, and has a CKA of {between.max(axis=1).mean():.2f} with it, on average."
    )
    published = {
        "lower and upper layers are alike (CKA above 0.5)": bool(across > ALIKE) if len(within) > 1 else None,
        "more than those of a convolutional network": None,
    }
    return Finding(text, published)


if __name__ == "__main__":
    terminal.run(main)
