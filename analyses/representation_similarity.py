"""How alike the representations of layers are, within two models and between them.

Raghu et al. 2021, Do Vision Transformers See Like Convolutional Neural Networks?, arXiv:2108.08810, figures 1 and 2. Expected:
the representations of a ViT are alike throughout its depth, lower layers like higher ones, where a ResNet's fall apart into
stages. As published here: the linear CKA of a layer in the lower half with one in the upper half is above 0.5 on average.

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
from vit_probe import steps, terminal
from vit_probe.measures.representation_similarity import RepresentationSimilarity, check_same_images
from vit_probe.options import Formats, ImagePaths, Limit, Model, Out
from vit_probe.plots.representation_similarity import SimilarityPanel, plot_representation_similarities
from vit_probe.run import AttentionRun

OTHER = Path(__file__).parent / "snapshots" / "epoch-016.safetensors"
ALIKE = 0.5


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
    runs = [AttentionRun(steps.load(name), photographs) for name in (model, other)]
    mine, theirs = (RepresentationSimilarity(run.layers, keep=True) for run in runs)
    for run, measure in zip(runs, (mine, theirs), strict=True):
        run.observe(measure)
    check_same_images(*runs)
    results = [mine.compute(), theirs.compute(), mine.compute(other=theirs)]
    name, second = (Path(one).name.removesuffix(".safetensors") for one in (model, other))
    titles = (name, second, "between the two")
    labels: list[dict[str, str]] = [{}, {}, {"down": f"Layer of {name}", "across": f"Layer of {second}"}]
    drawn = [SimilarityPanel(one.similarity, title, **of) for one, title, of in zip(results, titles, labels, strict=True)]
    table = pd.concat([one.to_dataframe().assign(models=title) for one, title in zip(results, titles, strict=True)])
    provenance = {which: run.provenance(mine.options) for which, run in zip(("model", "other"), runs, strict=True)}
    finding = found(results[0].similarity, results[2].similarity)
    keep("representation_similarity", plot_representation_similarities(drawn), table, finding, provenance, folder, formats)


def found(within: np.ndarray, between: np.ndarray) -> Finding:
    """Of the similarity within the model, and that with another."""
    half = max(len(within) // 2, 1)
    across = within[:half, -half:].mean()
    place, likest = np.linspace(0, 1, len(between)), between.argmax(axis=1) / max(between.shape[1] - 1, 1)
    away = np.abs(place - likest).mean()
    text = (
        f"A layer of the lower half has a CKA of {across:.2f} with one of the upper half, on average; the first layer has "
        f"{within[0, -1]:.2f} with the last, and the least of all pairs is {within.min():.2f}. In the other model, the layer "
        f"that is most like a layer lies {away:.0%} of the depth away from its place, and has a CKA of "
        f"{between.max(axis=1).mean():.2f} with it, on average."
    )
    return Finding(text, holds=bool(across > ALIKE))


if __name__ == "__main__":
    terminal.run(main)
