"""Position embeddings of a model, and of small ones that differ in nothing else, with the accuracy of each kind.

Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7 (centre), figure 10 and table 8 (ViT-B/16, 5-shot ImageNet: 61.4 % without
positions; 64.2, 64.0 and 64.0 % with 1-D, 2-D and relative ones). Expected: the nearer two patches, the more alike their
embeddings; without positions a model is worse; which kind it has matters little. As published here: similarity and distance
correlate below -0.5 in the model; without positions top-1 is below the mean of the three kinds, by two standard errors of a
difference (as if of independent images, though all saw the same; and each kind was trained once, so that the luck of a seed is
not in it); these three lie within half of that loss, which stays open where the loss is not clear, or where they lie farther
apart, but within what chance makes of three (3.31 standard errors). Sine-cosine, whose embeddings all resemble each other,
stands for the paper's relative positions. The small models come of `python -m analyses.train_variants DATA`.

    python -m analyses.position_similarity --model demo
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from analyses.study import Finding, keep
from analyses.train_variants import FOLDER, read_variants
from vit_probe import position_similarity
from vit_probe.atomic_io import write_bytes
from vit_probe.cli import setup as steps
from vit_probe.cli.console import run
from vit_probe.cli.options import Formats, Model, Out
from vit_probe.measures import PositionSimilarityResult
from vit_probe.measures.position_similarity import position_nearness
from vit_probe.plots.position_similarity import plot_position_similarities
from vit_probe.runner.run import model_provenance

KINDS = {"none": "no positions", "learned_1d": "learned 1-D", "learned_2d": "learned 2-D", "sincos_2d": "sine-cosine"}

OF_THREE = 3.31  # standard errors: the 95 % point of the studentized range of three


def main(
    model: Model = "demo",
    variants: Annotated[Path, typer.Option(help="Folder that `train_variants` made.")] = FOLDER,
    out: Out = Path("figures"),
    format: Formats = None,
) -> None:
    """Draws the position similarities of a model, and of small ones that differ in their positions alone."""
    folder, formats, _ = steps.prepare(None, None, out, None, format)
    trained = read_variants(variants).loc[list(KINDS)].drop(columns="command")
    models = {kind: steps.load(str(variants / f"{kind}.safetensors")) for kind in KINDS}
    models = {"model": steps.load(model)} | models
    found: dict[str, PositionSimilarityResult | None] = {"model": position_similarity(models["model"])}
    for kind in KINDS:  # without positions no patch differs from another
        found[kind] = steps.skip_unsupported(kind, partial(position_similarity, models[kind]), verbose=False)
    maps = {name: result.similarity for name, result in found.items() if result is not None}
    near = pd.Series({name: position_nearness(similarity) for name, similarity in maps.items()}, name="nearness")
    trained["standard_error"] = np.sqrt(trained.top1 * (100 - trained.top1) / trained.images)
    kinds, error = trained.top1.drop("none"), trained.standard_error.max()
    loss, apart = kinds.mean() - trained.top1["none"], kinds.max() - kinds.min()
    clear, chance = 2 * error * np.sqrt(1 + 1 / len(kinds)), OF_THREE * error
    worse = None if abs(loss) <= clear else bool(loss > 0)
    alike = True if apart < loss / 2 else None if apart <= chance else False
    name = str(models["model"].name)
    text = (
        f"In {name}, similarity and distance correlate at {near['model']:.2f}. Without positions a small model has "
        f"{trained.top1['none']:.1f} % top-1, {loss:.1f} points below the mean of the three kinds, "
        f"{'no ' if abs(loss) <= clear else ''}more than two standard errors ({clear:.1f}). Those lie {apart:.1f} apart: "
        f"{', '.join(f'{KINDS[str(kind)]} {top1:.1f} %' for kind, top1 in kinds.items())}."
    )
    titles = {"model": name} | {kind: f"{label}\n{trained.top1[kind]:.1f} % top-1" for kind, label in KINDS.items()}
    figure = plot_position_similarities({title: maps.get(kind) for kind, title in titles.items()})
    pairs = pd.concat([result.to_dataframe().assign(model=kind) for kind, result in found.items() if result is not None])
    write_bytes(folder / "position_similarity_maps.csv", pairs.to_csv(index=False, float_format="%.4g").encode())
    table = trained.reindex(list(titles)).join(near).rename_axis("model").reset_index()
    published = {
        "the nearer two patches, the more alike their embeddings": bool(near["model"] < -0.5),
        "without positions a model is worse": worse,
        "which kind it has matters little beside that": alike if worse else None,
    }
    finding = Finding(text, published)
    provenance = {kind: model_provenance(network) for kind, network in models.items()}
    keep("position_similarity", figure.axes[0], table, finding, provenance, folder, formats)


if __name__ == "__main__":
    run(main)
