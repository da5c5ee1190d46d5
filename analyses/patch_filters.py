"""Principal components of the patch-embedding filters of a ViT, beside those of random weights.

Published (Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5 and figure 7 (left)): the components look like plausible basis
functions for the fine structure of a patch, as the first-layer filters of convolutional networks do (AlexNet, Krizhevsky et al.
2012). Criterion used here: more than half of the spatial variance of the components lies in the lowest quarter of spatial
frequencies, which holds less than half of it if weights are random (about a quarter). `--cnn` shows the filters of a
convolutional network beside them.

    python -m analyses.patch_filters --model demo --cnn alexnet.pth
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from analyses.study import Finding, keep
from vit_probe import load_model, patch_filters
from vit_probe.cli.study import WeightsStudyOptions, output_folder, run_study
from vit_probe.measures.patch_filters import convolution_filters, low_frequency_share
from vit_probe.models.reinitialize import random_weights
from vit_probe.plots.patch_filters import plot_filter_panels

SEED = 0  # of the random weights

Network = Annotated[Path | None, typer.Option(help="State dict of a convolutional network (.safetensors, .pth).")]


def main(options: WeightsStudyOptions, cnn: Network = None) -> None:
    """Draw the filters of a ViT beside those of random weights and of a convolutional network."""
    output_folder(options.out)
    network = {} if cnn is None else {"convolutional": convolution_filters(cnn)}
    model = load_model(options.model)
    shown = {"trained": patch_filters(model), "random": patch_filters(random_weights(model, seed=SEED))} | network
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
        f"The lowest quarter of spatial frequencies holds {share['trained']:.0%} of the spatial variance of the "
        f"{count['trained']} of the filters, and {share['random']:.0%} if weights are random."
    )
    if network:
        text += f" It holds {share['convolutional']:.0%} of that of the first-layer filters of {names['convolutional']}."
    smooth = share["trained"] > 0.5 > share["random"]
    finding = Finding(text, {"the filters are smooth, and those of random weights are not": smooth})
    keep("patch_filters", figure, table, finding, provenance, options)


if __name__ == "__main__":
    run_study(main)
