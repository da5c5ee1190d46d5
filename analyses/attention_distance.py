"""How far each head looks, layer by layer, beside how far the units of convolutional networks see.

Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5, appendix D.7, figures 7 (right) and 11: already in the lowest layers
some heads look across most of the image, which convolutions do not (24 layers of 3 x 3: a receptive field of 49 pixels); others
are local; in the second half of the network most heads attend widely. As published here: in the first third of the layers some
head's mean distance is more than half of these 49 pixels (which every model for large images passes); some heads there are
local, their mean distance below half of uniform attention's, and some are not (which random weights do not pass, though they do
the others); in the second half of the layers most are not.
A head's distance is a mean, half a receptive field a limit. Dotted: the like of attention distance, the mean over what a unit
of even kernels sees.

    python -m analyses.attention_distance --model demo
"""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from analyses.study import Finding, are_local, in_first_third, keep
from vit_probe import mean_attention_distance
from vit_probe.cli import setup as steps
from vit_probe.cli.console import run
from vit_probe.cli.options import Formats, ImagePaths, Limit, Model, Out
from vit_probe.measures.receptive_field import ARCHITECTURES, plain_stack, receptive_field
from vit_probe.plots.receptive_field import plot_attention_beside_convolutions

NETWORKS = {"24 x conv 3 x 3": plain_stack(24)} | {name: ARCHITECTURES[name] for name in ("AlexNet", "VGG-16", "ResNet-50")}


def main(
    model: Model = "demo", images: ImagePaths = None, out: Out = Path("figures"), limit: Limit = 128, format: Formats = None
) -> None:
    """How far each head looks, beside how far the units of convolutional networks see."""
    folder, formats, photographs = steps.prepare(images, None, out, limit, format)
    result = mean_attention_distance(steps.load(model), photographs)
    heads = result.to_dataframe()
    fields = pd.concat([receptive_field(layers, network=name).to_dataframe() for name, layers in NETWORKS.items()])
    table = pd.concat([heads.assign(network=result.provenance["model"]["name"]), fields])
    figure = plot_attention_beside_convolutions(heads, fields)
    keep("attention_distance", figure, table, found(heads, fields), result.provenance, folder, formats)


def found(heads: pd.DataFrame, fields: pd.DataFrame) -> Finding:
    """Of the table of heads, and of those of the convolutional networks, the plain stack first."""
    depth = int(heads["layer"].max()) + 1
    heads = heads.assign(local=are_local(heads))
    early, late = heads[in_first_third(heads)], heads[heads["layer"] >= min(depth / 2, depth - 1)]
    third = early["layer"].nunique()
    farthest, first = early["distance"].max(), heads.loc[heads["layer"] == 0, "distance"].max()
    plain = fields[fields["network"] == next(iter(NETWORKS))].iloc[-1]
    text = (
        f"In the first {third} of {depth} layers the farthest head looks {farthest:.1f} px far on average, in layer 0 "
        f"{first:.1f} px. 24 convolutions of 3 x 3 see {plain['receptive_field']} px: {plain['reach']:.0f} px to each side, "
        f"{math.sqrt(2) * plain['reach']:.1f} px into the corners, {plain['mean_distance']:.1f} px on average if kernels are "
        f"even. Of the heads of these {third} layers {early['local'].mean():.0%} are local (below half of uniform attention's "
        f"{heads['uniform_distance'].max():.1f} px), of those of the second half of the layers {late['local'].mean():.0%}."
    )
    published = {
        "some head of the first third looks farther than 24 convolutions of 3 x 3 reach": bool(farthest > plain["reach"]),
        "of the heads there some are local, and some are not": bool(early["local"].any() and not early["local"].all()),
        "of those of the second half most are not": bool(late["local"].mean() < 0.5) if depth > 1 else None,
    }
    return Finding(text, published)


if __name__ == "__main__":
    run(main)
