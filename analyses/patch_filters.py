"""What the first layer of a ViT responds to: principal components of its filters, beside those of random weights.

Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5 and figure 7 (left): the components look like plausible basis functions
for the fine structure of a patch, as the first-layer filters of convolutional networks do (AlexNet, Krizhevsky et al. 2012). As
published here: more than half of the components' variance over space lies in the lowest quarter of spatial frequencies, which
holds about a quarter of it where weights are random. `--cnn` shows a convolutional network's filters beside them.

    python -m analyses.patch_filters --model demo --cnn alexnet.pth
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from analyses.study import Finding, keep
from vit_probe import patch_filters
from vit_probe.cli import setup as steps
from vit_probe.cli.console import run
from vit_probe.cli.options import Formats, Model, Out
from vit_probe.measures.patch_filters import convolution_filters, low_frequency_share
from vit_probe.models.reinitialize import random_weights
from vit_probe.plots.patch_filters import plot_filter_panels

SEED = 0  # of the random weights

Network = Annotated[Path | None, typer.Option(help="State dict of a convolutional network (.safetensors, .pth).")]


def main(model: Model = "demo", cnn: Network = None, out: Out = Path("figures"), format: Formats = None) -> None:
    """Principal components of a ViT's first layer, beside those of random weights and a convolutional network's filters."""
    folder, formats, _ = steps.prepare(None, None, out, None, format)
    network = {} if cnn is None else {"convolutional": convolution_filters(cnn)}
    loaded = steps.load(model)
    shown = {"trained": patch_filters(loaded), "random": patch_filters(random_weights(loaded, seed=SEED))} | network
    share = {weights: low_frequency_share(result.filters) for weights, result in shown.items()}
    table = pd.concat([result.to_dataframe().assign(weights=weights) for weights, result in shown.items()])
    provenance = {weights: result.provenance for weights, result in shown.items()} | {"seed": SEED}
    names = {weights: result.provenance["model"]["name"] for weights, result in shown.items()} | {"random": "random weights"}
    count = {
        weights: f"first {len(result.filters)} components" if result.principal else f"{len(result.filters)} filters"
        for weights, result in shown.items()
    }
    figure = plot_filter_panels({f"{names[key]}\n({count[key]})": result.filters for key, result in shown.items()})
    text = (
        f"The lowest quarter of spatial frequencies holds {share['trained']:.0%} of the variance over space of the "
        f"{count['trained']} of the filters, and {share['random']:.0%} where weights are random."
    )
    if network:
        text += f" Of the first-layer filters of {names['convolutional']} it holds {share['convolutional']:.0%}."
    smooth = share["trained"] > 0.5 > share["random"]
    finding = Finding(text, {"the filters are smooth, and those of random weights are not": smooth})
    keep("patch_filters", figure, table, finding, provenance, folder, formats)


if __name__ == "__main__":
    run(main)
