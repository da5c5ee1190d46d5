"""How many tokens each head spreads its attention over, against depth and against how far it looks.

Xie et al. 2022, arXiv:2205.13543: in a supervised ViT heads of the lower layers attend to few tokens and differ from
each other, those of the higher layers attend broadly and alike; with masked image modelling heads differ in all layers. Clark
et al. 2019, arXiv:1906.04341, section 3.3 and figure 4 (BERT): some heads of the lowest layers are broad already. As published
here: over the heads' means entropy is larger in the last third of the layers than in the first, the range of the heads of a
layer is smaller there, and a head of the first third has at least 90 % of uniform attention's entropy. The bundled model was
trained with labels and by masking. Zhai et al. 2023, arXiv:2303.06296, find entropy near 0 where training becomes unstable.

    python -m analyses.attention_entropy --model demo
"""

from __future__ import annotations

from pathlib import Path

import typer
from matplotlib.figure import Figure

from analyses.study import Finding, keep
from vit_probe import steps, terminal
from vit_probe.measures import AttentionDistance, AttentionEntropy
from vit_probe.measures.head_table import head_table
from vit_probe.options import Formats, ImagePaths, Limit, Model, Out
from vit_probe.plots import figure_size, style
from vit_probe.plots.attention_entropy import plot_entropy_and_distance
from vit_probe.run import AttentionRun

BROAD = 0.9  # of uniform attention's entropy

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Model = "demo", images: ImagePaths = None, out: Out = Path("figures"), limit: Limit = 128, format: Formats = None
) -> None:
    """Draws the entropy of every head's attention against depth, and against its attention distance."""
    folder, formats, photographs = steps.prepare(images, None, out, limit, format)
    run = AttentionRun(steps.load(model), photographs)
    far, broad = AttentionDistance(run.grid, windows=run.windows), AttentionEntropy(run.grid, windows=run.windows)
    run.observe(far, broad)
    entropy = broad.compute(run.provenance(broad.options))
    table = head_table(far.compute(run.provenance(far.options)), entropy)
    layers = table.groupby("layer").entropy
    ranges, third = layers.max() - layers.min(), max(1, len(run.layers) // 3)
    mean = [table.entropy[table.layer.isin(part)].mean() for part in (ranges.index[:third], ranges.index[-third:])]
    spread = [ranges[:third].mean(), ranges[-third:].mean()]
    part = table.entropy / table.uniform_entropy
    broadest, correlation = part[table.layer < third].max(), table.entropy.corr(table.distance)
    text = (
        f"From the first third of the layers to the last the heads' entropy goes from {mean[0]:.2f} to {mean[1]:.2f} nats on "
        f"average (uniform attention: {table.uniform_entropy.iloc[-1]:.2f}), and the range of the heads of a layer from "
        f"{spread[0]:.2f} to {spread[1]:.2f}; the broadest head of the first third has {broadest:.0%} of uniform "
        f"attention's{'' if broadest >= BROAD else f', less than the {BROAD:.0%} that were expected'}. "
        f"Over all {len(table)} heads entropy correlates with distance at {correlation:.2f}; the sharpest, "
        f"{table.entropy.min():.2f} nats, looks {table.distance.iloc[table.entropy.argmin()]:.1f} px far."
    )
    with style():
        figure = Figure(figsize=figure_size("icml-page", 0.36))
        figure.set_layout_engine("constrained", w_pad=0.06)
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        entropy.plot(ax=left)
        plot_entropy_and_distance(table, ax=right)
    finding = Finding(text, holds=bool(mean[1] > mean[0] and spread[1] < spread[0] and broadest >= BROAD))
    keep("attention_entropy", figure, table, finding, run.provenance(far.options | broad.options), folder, formats)


if __name__ == "__main__":
    terminal.run(app)
