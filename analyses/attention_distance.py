"""Mean attention distance of each head against depth, beside the receptive fields of convolutional networks.

Published (Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5, appendix D.7, figures 7 (right) and 11): already in the
lowest layers, some heads attend to most of the image, which convolutions cannot (24 layers of 3 x 3 have a receptive field of
49 pixels), while others are local; in the second half of the network, most heads attend widely. Criteria used here:

- in the first third of the layers, the mean distance of some head is more than half of these 49 pixels (every model for large
  images meets this criterion);
- some heads in these layers are local, with a mean distance below half of that of uniform attention, and some are not (a model
  with random weights fails this criterion, although it meets the others);
- in the second half of the layers, most heads are not local.

The distance of a head is a mean, whereas half a receptive field is an upper limit. The dotted line is the quantity to compare
with attention distance: the mean distance of the pixels that a unit sees if its kernels are uniform.

    python -m analyses.attention_distance --model demo
"""

from __future__ import annotations

import math

import pandas as pd

from analyses.study import Finding, are_local, in_first_third, keep
from vit_probe import mean_attention_distance
from vit_probe.cli.study import StudyOptions, load, run_study
from vit_probe.measures.receptive_field import ARCHITECTURES, plain_stack, receptive_field
from vit_probe.plots.receptive_field import plot_attention_beside_convolutions

NETWORKS = {"24 x conv 3 x 3": plain_stack(24)} | {name: ARCHITECTURES[name] for name in ("AlexNet", "VGG-16", "ResNet-50")}


def main(options: StudyOptions) -> None:
    """Compare the attention distance of each head with the receptive fields of convolutional networks."""
    model, photographs = load(options)
    result = mean_attention_distance(model, photographs)
    heads = result.to_dataframe()
    fields = pd.concat([receptive_field(layers, network=name).to_dataframe() for name, layers in NETWORKS.items()])
    table = pd.concat([heads.assign(network=result.provenance["model"]["name"]), fields])
    figure = plot_attention_beside_convolutions(heads, fields)
    keep("attention_distance", figure, table, found(heads, fields), result.provenance, options)


def found(heads: pd.DataFrame, fields: pd.DataFrame) -> Finding:
    """The finding, from the table of heads and the tables of the convolutional networks, of which the plain stack is first."""
    depth = int(heads["layer"].max()) + 1
    heads = heads.assign(local=are_local(heads))
    early, late = heads[in_first_third(heads)], heads[heads["layer"] >= min(depth / 2, depth - 1)]
    third = early["layer"].nunique()
    farthest, first = early["distance"].max(), heads.loc[heads["layer"] == 0, "distance"].max()
    plain = fields[fields["network"] == next(iter(NETWORKS))].iloc[-1]
    text = (
        f"In the first {third} of {depth} layers, the largest mean attention distance of a head is {farthest:.1f} px "
        f"({first:.1f} px in layer 0). A stack of 24 convolutions of 3 x 3 has a receptive field of {plain['receptive_field']} "
        f"px: {plain['reach']:.0f} px to each side, {math.sqrt(2) * plain['reach']:.1f} px into the corners, and "
        f"{plain['mean_distance']:.1f} px on average if kernels are uniform. Of the heads in these {third} layers, "
        f"{early['local'].mean():.0%} are local (distance below half of that of uniform attention, "
        f"{heads['uniform_distance'].max():.1f} px); in the second half of the layers, {late['local'].mean():.0%} are."
    )
    published = {
        "in the first third of the layers, some head has a distance beyond the reach of 24 convolutions of 3 x 3": bool(
            farthest > plain["reach"]
        ),
        "some heads in these layers are local, and some are not": bool(early["local"].any() and not early["local"].all()),
        "in the second half of the layers, most heads are not local": bool(late["local"].mean() < 0.5) if depth > 1 else None,
    }
    return Finding(text, published)


if __name__ == "__main__":
    run_study(main)
