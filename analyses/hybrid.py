"""Attention distances in a pure ViT and in a hybrid, whose tokens come from the feature map of a ResNet.

Published (Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5 and figure 11: ViT-L/16 and R50x1 + ViT-L/16): the highly
local heads in the lowest layers of a ViT are less pronounced in a hybrid, whose ResNet already does their work. Criterion used
here, for the heads in the first third of the layers: the smallest attention distance of the hybrid, relative to that of uniform
attention, exceeds the smallest one of the pure ViT by a tenth. The question stays open if the pure ViT has no local heads
there, with a distance below half of that of uniform attention.

Compare models with the same number of patches of the same size; any checkpoints will do. The default is two small models that
`python -m analyses.train_variants DATA` trained with the same recipe, each only once, so that the variance between seeds is
unknown.

    python -m analyses.hybrid --model analyses/variants/learned_1d.safetensors --hybrid analyses/variants/hybrid.safetensors
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from torch import nn

from analyses.study import Finding, are_local, in_first_third, keep
from analyses.train_variants import FOLDER
from vit_probe import InputError, load_model, mean_attention_distance
from vit_probe.cli.study import Model, StudyOptions, complain, load, run_study
from vit_probe.plots.attention_distance import plot_attention_distances

CLEAR = 0.1  # of uniform attention's distance
NUMBERS = (("distance", "min"), ("distance", "mean"), ("uniform_distance", "mean"))


@dataclass(frozen=True, kw_only=True)
class HybridOptions(StudyOptions):
    """Of this study, which compares two small models by default."""

    model: Model = str(FOLDER / "learned_1d.safetensors")
    hybrid: Annotated[str, typer.Option(help="A hybrid; named in the same way as --model.")] = str(
        FOLDER / "hybrid.safetensors"
    )


def main(options: HybridOptions) -> None:
    """Draw the attention distances of a pure ViT and of a hybrid."""
    pure, photographs = load(options)
    models = {"pure": pure, "hybrid": load_model(options.hybrid)}
    if sum(isinstance(module, nn.Conv2d) for module in models["hybrid"].modules()) < 2:
        raise InputError(f"--hybrid {options.hybrid} is not a hybrid: no convolutional network makes its patches")
    results = {name: mean_attention_distance(network, photographs) for name, network in models.items()}
    frames = {name: result.to_dataframe() for name, result in results.items()}
    uniform = [frame["uniform_distance"].mean() for frame in frames.values()]
    if not math.isclose(*uniform):
        complain(
            f"note: the distance of uniform attention is {uniform[0]:.1f} px in one model and {uniform[1]:.1f} px in the other"
        )
    titles = {"pure": f"ViT\n{Path(options.model).name}", "hybrid": f"Hybrid (ResNet + ViT)\n{Path(options.hybrid).name}"}
    figure = plot_attention_distances({titles[name]: frame for name, frame in frames.items()})
    table = pd.concat([frame.assign(model=name, local=are_local(frame)) for name, frame in frames.items()])
    provenance = {name: result.provenance for name, result in results.items()}
    keep("hybrid", figure.axes[0], table, found(frames["pure"], frames["hybrid"]), provenance, options)


def found(pure: pd.DataFrame, hybrid: pd.DataFrame) -> Finding:
    """The finding, from the tables of the heads of both models."""
    early = [frame[in_first_third(frame)] for frame in (pure, hybrid)]
    local, nearest, mean, uniform = (
        [are_local(frame) for frame in early],
        *([frame[column].agg(how) for frame in early] for column, how in NUMBERS),
    )
    text = (
        f"In the first third of the layers, {local[0].sum()} of {len(local[0])} heads of the pure ViT and {local[1].sum()} of "
        f"{len(local[1])} heads of the hybrid are local (distance below half of that of uniform attention, {uniform[0]:.1f} px "
        f"and {uniform[1]:.1f} px). The smallest distances of a head there are {nearest[0]:.1f} px and {nearest[1]:.1f} px, "
        f"the mean distances {mean[0]:.1f} px and {mean[1]:.1f} px."
    )
    farther = bool(nearest[1] / uniform[1] - nearest[0] / uniform[0] > CLEAR) if local[0].any() else None
    return Finding(text, {"local heads are less pronounced in the hybrid": farther})


if __name__ == "__main__":
    run_study(main)
