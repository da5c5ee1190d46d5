"""Similarity of position embeddings, in a model and in small ones that differ in their kind of positions only; accuracies.

Published (Dosovitskiy et al. 2021, arXiv:2010.11929, figure 7 (centre), figure 10 and table 8: ViT-B/16, 5-shot ImageNet,
61.4 % without positions; 64.2, 64.0 and 64.0 % with 1-D, 2-D and relative ones): the nearer two patches, the more similar their
embeddings; a model without positions is worse; the kind of positions matters little. Criteria used here:

- similarity and distance correlate below -0.5 in the model;
- top-1 without positions is below the mean of the paper's three kinds by more than two standard errors of the difference. The
  standard error treats the models' validation images as independent samples, although they are the same, and leaves out the
  variance between seeds, because each kind was trained once;
- these three kinds differ by less than half of that loss. The question stays open if the loss is not significant, or if they
  differ by more, but by less than is expected of three equal ones (3.31 standard errors).

Sine-cosine positions, which are not in the paper's table, are shown beside them. Relative positions are terms in the attention,
without an embedding of each patch, and so have an accuracy but no map. (`position_similarity` would compare the tokens of a
constant image instead, which is another quantity.) The small models are those of `python -m analyses.train_variants DATA`.

    python -m analyses.position_similarity --model demo
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from analyses.study import Finding, keep
from analyses.train_variants import FOLDER, read_variants
from vit_probe import load_model, position_similarity
from vit_probe.atomic_io import write_bytes
from vit_probe.cli.study import WeightsStudyOptions, output_folder, run_study
from vit_probe.measures.position_similarity import position_nearness
from vit_probe.plots.position_similarity import plot_position_similarities
from vit_probe.runner.run import model_provenance

KINDS = {
    "none": "no positions",
    "learned_1d": "learned 1-D",
    "learned_2d": "learned 2-D",
    "relative": "relative",
    "sincos_2d": "sine-cosine",
}
PAPERS_KINDS = ["learned_1d", "learned_2d", "relative"]  # table 8

OF_THREE = 3.31  # standard errors: the 95 % point of the studentized range of three


def main(
    options: WeightsStudyOptions,
    variants: Annotated[Path, typer.Option(help="Folder that `train_variants` made.")] = FOLDER,
) -> None:
    """Draws the position similarities of a model, and of small ones that differ in their kind of positions only."""
    folder = output_folder(options.out)
    trained = read_variants(variants).loc[list(KINDS)].drop(columns="command")
    models: dict[str, Any] = {kind: load_model(variants / f"{kind}.safetensors") for kind in KINDS}
    models = {"model": load_model(options.model)} | models
    found = {"model": position_similarity(models["model"])}
    found |= {kind: position_similarity(models[kind]) for kind in KINDS if models[kind].position_table() is not None}
    maps = {name: result.similarity for name, result in found.items()}
    near = pd.Series({name: position_nearness(similarity) for name, similarity in maps.items()}, name="nearness")
    trained["standard_error"] = np.sqrt(trained.top1 * (100 - trained.top1) / trained.images)
    kinds, error = trained.top1[PAPERS_KINDS], trained.standard_error[["none", *PAPERS_KINDS]].max()
    loss, apart = kinds.mean() - trained.top1["none"], kinds.max() - kinds.min()
    clear, chance = 2 * error * np.sqrt(1 + 1 / len(kinds)), OF_THREE * error
    worse = None if abs(loss) <= clear else bool(loss > 0)
    alike = True if apart < loss / 2 else None if apart <= chance else False
    name = str(models["model"].name)
    text = (
        f"In {name}, similarity and distance correlate at {near['model']:.2f}. Without positions a small model has "
        f"{trained.top1['none']:.1f} % top-1, {loss:.1f} points below the mean of the paper's three kinds, "
        f"{'no ' if abs(loss) <= clear else ''}more than two standard errors ({clear:.1f}). Those lie {apart:.1f} apart: "
        f"{', '.join(f'{KINDS[str(kind)]} {top1:.1f} %' for kind, top1 in kinds.items())}. "
        f"Sine-cosine positions have {trained.top1['sincos_2d']:.1f} %."
    )
    titles = {"model": name} | {kind: f"{label}\n{trained.top1[kind]:.1f} % top-1" for kind, label in KINDS.items()}
    figure = plot_position_similarities({title: maps.get(kind) for kind, title in titles.items()})
    for panel, kind in zip(figure.axes, titles, strict=False):  # the panels come first
        if kind not in maps:
            panel.texts[0].set_text("No table\nto compare")
    pairs = pd.concat([result.to_dataframe().assign(model=kind) for kind, result in found.items()])
    write_bytes(folder / "position_similarity_maps.csv", pairs.to_csv(index=False, float_format="%.4g").encode())
    table = trained.reindex(list(titles)).join(near).rename_axis("model").reset_index()
    published = {
        "the nearer two patches, the more alike their embeddings": bool(near["model"] < -0.5),
        "without positions a model is worse": worse,
        "which kind it has matters little beside that": alike if worse else None,
    }
    finding = Finding(text, published)
    provenance = {kind: model_provenance(network) for kind, network in models.items()}
    keep("position_similarity", figure.axes[0], table, finding, provenance, options)


if __name__ == "__main__":
    run_study(main)
