"""How far the heads of a pure ViT and of a hybrid look, whose tokens come of a ResNet's map.

Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5 and figure 11 (ViT-L/16 and R50x1 + ViT-L/16). Expected: the highly
local heads of a ViT's lowest layers are less pronounced in a hybrid, whose ResNet has done their work. As published here: of
the heads in the first third of the layers the pure ViT has local ones, which look less than half as far as uniform attention
(else it stays open), and the hybrid's nearest looks farther than the pure ViT's nearest by a tenth of uniform attention's
distance. Compare models with as many patches of one size; any checkpoints will do. By default two small models that
`python -m analyses.train_variants DATA` trained alike, each once, so that the luck of a seed is not told.

    python -m analyses.hybrid --model analyses/variants/learned_1d.safetensors --hybrid analyses/variants/hybrid.safetensors
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from torch import nn

from analyses.study import Finding, are_local, in_first_third, keep
from analyses.train_variants import FOLDER
from vit_probe import InputError, mean_attention_distance
from vit_probe.cli import console as terminal
from vit_probe.cli import setup as steps
from vit_probe.cli.options import Formats, ImagePaths, Limit, Model, Out
from vit_probe.plots.attention_distance import plot_attention_distances

CLEAR = 0.1  # of uniform attention's distance
NUMBERS = (("distance", "min"), ("distance", "mean"), ("uniform_distance", "mean"))


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
    if sum(isinstance(module, nn.Conv2d) for module in models["hybrid"].modules()) < 2:
        raise InputError(f"--hybrid {hybrid} is none: its patches come of no convolutional network")
    results = {name: mean_attention_distance(network, photographs) for name, network in models.items()}
    frames = {name: result.to_dataframe() for name, result in results.items()}
    even = [frame["uniform_distance"].mean() for frame in frames.values()]
    if not math.isclose(*even):
        terminal.complain(f"note: uniform attention looks {even[0]:.1f} px far in one model and {even[1]:.1f} px in the other")
    titles = {"pure": f"ViT\n{Path(model).name}", "hybrid": f"Hybrid (ResNet + ViT)\n{Path(hybrid).name}"}
    figure = plot_attention_distances({titles[name]: frame for name, frame in frames.items()})
    table = pd.concat([frame.assign(model=name, local=are_local(frame)) for name, frame in frames.items()])
    provenance = {name: result.provenance for name, result in results.items()}
    keep("hybrid", figure.axes[0], table, found(frames["pure"], frames["hybrid"]), provenance, folder, formats)


def found(pure: pd.DataFrame, hybrid: pd.DataFrame) -> Finding:
    """Of the tables of both models' heads."""
    early = [frame[in_first_third(frame)] for frame in (pure, hybrid)]
    local, nearest, mean, even = (
        [are_local(frame) for frame in early],
        *([frame[column].agg(how) for frame in early] for column, how in NUMBERS),
    )
    text = (
        f"In the first third of the layers {local[0].sum()} of {len(local[0])} heads of the pure ViT are local, "
        f"{local[1].sum()} of {len(local[1])} of the hybrid (below half of uniform attention's {even[0]:.1f} px and "
        f"{even[1]:.1f} px); the nearest look {nearest[0]:.1f} px and {nearest[1]:.1f} px far, on average the heads of these "
        f"layers {mean[0]:.1f} px and {mean[1]:.1f} px."
    )
    farther = bool(nearest[1] / even[1] - nearest[0] / even[0] > CLEAR) if local[0].any() else None
    return Finding(text, {"local heads are less pronounced in the hybrid": farther})


if __name__ == "__main__":
    terminal.run(main)
