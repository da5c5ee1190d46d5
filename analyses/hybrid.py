"""How far the heads of a pure ViT and of a hybrid look, whose tokens come of a ResNet's map.

Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5 and figure 11 (ViT-L/16 and R50x1 + ViT-L/16). Expected: the highly
local heads of a ViT's lowest layers are less pronounced in a hybrid, whose ResNet has done their work. As published here: of
the heads in the first third of the layers a smaller share is local, which means that its mean attention distance is below half
of uniform attention's. Compare models with as many patches of one size; any checkpoints will do. By default two small models
that `python -m analyses.train_variants DATA` trained alike.

    python -m analyses.hybrid --model analyses/variants/learned_1d.safetensors --hybrid analyses/variants/hybrid.safetensors
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from analyses.study import Finding, are_local, in_first_third, keep
from analyses.train_variants import FOLDER
from vit_probe import mean_attention_distance, steps, terminal
from vit_probe.options import Formats, ImagePaths, Limit, Model, Out
from vit_probe.plots.attention_distances import plot_attention_distances


def main(
    model: Model = str(FOLDER / "learned_1d.safetensors"),
    hybrid: Annotated[str, typer.Option(help="A hybrid, named as the model is.")] = str(FOLDER / "hybrid.safetensors"),
    images: ImagePaths = None,
    out: Out = Path("figures"),
    limit: Limit = 128,
    format: Formats = None,
) -> None:
    """Draws how far the heads of a pure ViT and of a hybrid look."""
    folder, formats, photographs = steps.prepare(images, None, out, limit, format)
    models = {"pure": steps.load(model), "hybrid": steps.load(hybrid)}
    results = {name: mean_attention_distance(network, photographs) for name, network in models.items()}
    frames = {name: result.to_dataframe() for name, result in results.items()}
    for frame in frames.values():
        frame["local"] = are_local(frame)
    early = {name: frame[in_first_third(frame)] for name, frame in frames.items()}
    share = {name: frame.local.mean() for name, frame in early.items()}
    grids = [(result.provenance["grid"]["rows"], result.provenance["grid"]["cols"]) for result in results.values()]
    if grids[0] != grids[1]:
        terminal.complain(f"note: the pure model has {grids[0]} rows and columns of patches, the hybrid {grids[1]}")
    counts = {name: f"{frame.local.sum()} of {len(frame)}" for name, frame in early.items()}
    text = (
        f"In the first third of the layers {counts['pure']} heads of the pure ViT are local, {counts['hybrid']} of the hybrid "
        f"(below half of uniform attention's {frames['pure'].uniform_distance.iloc[0]:.1f} px"
        f"{'' if any(share.values()) else '; models without any leave the question open'}); the nearest look "
        f"{early['pure'].distance.min():.1f} px and {early['hybrid'].distance.min():.1f} px far, on average the heads of these "
        f"layers {early['pure'].distance.mean():.1f} px and {early['hybrid'].distance.mean():.1f} px."
    )
    titles = {"pure": "ViT", "hybrid": "Hybrid (ResNet + ViT)"}
    figure = plot_attention_distances({titles[name]: frame for name, frame in frames.items()})
    table = pd.concat([frame.assign(model=name) for name, frame in frames.items()])
    provenance = {name: result.provenance for name, result in results.items()}
    finding = Finding(text, bool(share["hybrid"] < share["pure"]))
    keep("hybrid", figure.axes[0], table, finding, provenance, folder, formats)


if __name__ == "__main__":
    terminal.run(main)
