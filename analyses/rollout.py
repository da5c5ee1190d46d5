"""Where a ViT looks: attention rollout over black, beside what each head of the last layer has the class token attend to.

Dosovitskiy et al. 2021, arXiv:2010.11929, figures 6 and 14: rollout falls on what the class is told by. Caron et al. 2021,
arXiv:2104.14294, figures 1 and 3 (DINO): heads of the last layer attend to different regions. As published here: 60 % of a
head's attention lies on less than 30 % of the patches, half of what even attention needs (random weights need nearly as many as
that), and the maps of two heads of an image correlate by less than 0.5 on average; the predicted class loses its probability
sooner where patches of most rollout are taken away first than in random order, and than where those of least rollout are
(Petsiuk et al. 2018, arXiv:1806.07421). That stays open where the 95 % interval of the mean difference over photographs holds
0, and of a model without a classifier. Crops of a sample photograph count as one, and three are few: `--images` takes others.
Maps are drawn from their least (rollout) or 0 (heads) to their largest value.

    python -m analyses.rollout --model demo
"""

from __future__ import annotations

from pathlib import Path

from analyses.study import Finding, keep, more_than_nothing
from vit_probe.atomic_io import write_bytes
from vit_probe.cli import console as terminal
from vit_probe.cli import setup as steps
from vit_probe.cli.export import root_figure
from vit_probe.cli.options import Formats, ImagePaths, Limit, Model, Out
from vit_probe.measures import AttentionRollout
from vit_probe.measures.class_attention import ClassAttention
from vit_probe.measures.deletion import deletion
from vit_probe.plots import save_figure
from vit_probe.plots.class_attention import plot_class_attention
from vit_probe.runner.run import AttentionRun

SHOWN = 6
FEW = 0.3  # of the patches hold 60 % of a head's attention
DIFFERENT = 0.5  # two heads' maps correlate by less
SOONER = {
    "random": "without the patches of most rollout the class is lost sooner than in random order",
    "least rollout": "and sooner than without those of least rollout",
}


def main(
    model: Model = "demo", images: ImagePaths = None, out: Out = Path("figures"), limit: Limit = 128, format: Formats = None
) -> None:
    """Rollout over black, and the class token's attention in each head of the last layer."""
    folder, formats, photographs = steps.prepare(images, None, out, limit, format)
    loaded = steps.load(model)
    run = AttentionRun(loaded, photographs, keep_images=SHOWN)
    rolling = AttentionRollout(run.grid, windows=run.windows)
    attending = ClassAttention(run.grid, run.layers, windows=run.windows)
    run.observe(rolling, attending)
    rollout, heads = rolling.compute().maps, attending.compute(names=run.images.names)
    orders = {"most rollout": rollout, "most class attention": heads.maps.mean(axis=1), "least rollout": -rollout}
    deleted = steps.skip_unsupported("deletion is", lambda: deletion(loaded, photographs, orders))
    table = heads.beside(rollout)
    if deleted is not None:
        table = table.join(deleted.area.add_prefix("area, "))
    # Crops of one sample photograph are not independent, and count as one.
    whole = table.index.to_series() if images else table["name"].str.partition(", crop ")[0]
    means = table.groupby(whole).mean(numeric_only=True)
    mean = means.mean()
    text = (
        f"Two heads of layer {heads.layer} correlate by {mean.heads_correlation:.2f} over the patches, rollout and the mean of "
        f"all heads by {mean.rollout_correlation:.2f}; 60 % of a head's attention lies on {100 * mean.heads_patches:.0f} % of "
        f"the patches, of rollout on {100 * mean.rollout_patches:.0f} %, and of uniform attention on 60 %."
    )
    published: dict[str, bool | None] = {
        "heads of the last layer attend to different regions": bool(
            mean.heads_patches < FEW and mean.heads_correlation < DIFFERENT
        )
    }
    published |= dict.fromkeys(SOONER.values())
    others = []
    if deleted is None:
        text += " No patches were taken away, for want of classes to predict."
        for earlier in folder.glob("rollout_deletion.*"):
            earlier.unlink()
    else:
        differences = {order: means[f"area, {order}"] - means["area, most rollout"] for order in SOONER}
        told = {order: more_than_nothing(difference) for order, difference in differences.items()}
        published |= {SOONER[order]: sooner for order, (_, sooner) in told.items()}
        areas = {order: mean[f"area, {order}"] for order in orders}
        text += (
            f" While patches are taken away, the predicted class has a mean probability of {areas['most rollout']:.3f} where "
            f"those of most rollout go first, {areas['most class attention']:.3f} where those of most class attention do; "
            f"{told['random'][0]} more in random order, {told['least rollout'][0]} more where those of least rollout go first "
            f"(mean and 95 % interval, photographs: {len(means)})."
        )
        others = save_figure(root_figure(deleted.plot()), folder / "rollout_deletion", formats)
        curves = deleted.to_dataframe().to_csv(index=False, float_format="%.6g")
        others.append(write_bytes(folder / "rollout_deletion.csv", curves.encode()))
    figure = plot_class_attention(heads.maps[:SHOWN], run.images.kept(), rollout=rollout[:SHOWN])
    provenance = run.provenance(rolling.options | attending.options | {"orders": list(orders)})
    keep("rollout", figure, table, Finding(text, published), provenance, folder, formats, *others)


if __name__ == "__main__":
    terminal.run(main)
