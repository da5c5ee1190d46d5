"""Attention rollout, beside the attention of the class token in each head of the last layer.

Published: attention rollout highlights the regions that are relevant for classification (Dosovitskiy et al. 2021,
arXiv:2010.11929, figures 6 and 14); the heads of the last layer attend to different regions (Caron et al. 2021, DINO,
arXiv:2104.14294, figures 1 and 3). Criteria used here:

- 60 % of a head's attention lies on less than 30 % of the patches, half as many as uniform attention needs (random weights need
  nearly as many as uniform attention), and the maps of two heads correlate by less than 0.5, both on average over images;
- the probability of the predicted class falls sooner if the patches with most rollout are deleted first than if patches are
  deleted in random order (Petsiuk et al. 2018, arXiv:1806.07421);
- and sooner than if the patches with least rollout are deleted first.

The last two stay open if the 95 % confidence interval of the mean difference over photographs contains 0, and for a model
without a classifier. Crops of one sample photograph count as one photograph. Three photographs are few; `--images` takes
others. The colours of a map start at its lowest value (rollout) or at 0 (heads), and end at its highest value.

    python -m analyses.rollout --model demo
"""

from __future__ import annotations

from analyses.study import Finding, keep, mean_difference, merged_provenance
from vit_probe import attention_rollout, class_attention, measure
from vit_probe.atomic_io import write_bytes
from vit_probe.cli.study import StudyOptions, file_formats, load, root_figure, run_study, skip_unsupported
from vit_probe.measures.deletion import deletion
from vit_probe.plots import save_figure
from vit_probe.plots.class_attention import plot_class_attention

SHOWN = 6
FEW = 0.3  # share of the patches on which 60 % of a head's attention lies
DIFFERENT = 0.5  # largest correlation of the maps of two different heads
SOONER = {
    "random": "the class is lost sooner if patches with most rollout are deleted first than in random order",
    "least rollout": "and sooner than if those with least rollout are deleted first",
}


def main(options: StudyOptions) -> None:
    """Draw rollout beside the class token's attention in each head of the last layer, and delete patches in their order."""
    model, photographs = load(options)
    rolled, heads = measure(model, photographs, [attention_rollout, class_attention])
    rollout = rolled.maps
    orders = {"most rollout": rollout, "most class attention": heads.maps.mean(axis=1), "least rollout": -rollout}
    deleted = skip_unsupported("deletion is", lambda: deletion(model, photographs, orders))
    table = heads.beside(rollout)
    if deleted is not None:
        table = table.join(deleted.area.add_prefix("area, "))
    # Crops of one sample photograph are not independent, and count as one.
    photograph = table.index.to_series() if options.images else table["name"].str.partition(", crop ")[0]
    means = table.groupby(photograph).mean(numeric_only=True)
    mean = means.mean()
    text = (
        f"Over the patches, the maps of two heads of layer {heads.layer} correlate at {mean.heads_correlation:.2f}, and "
        f"rollout and the mean of all heads at {mean.rollout_correlation:.2f}; 60 % of a head's attention lies on "
        f"{100 * mean.heads_patches:.0f} % of the patches, 60 % of rollout on {100 * mean.rollout_patches:.0f} %, and 60 % of "
        "uniform attention on 60 %."
    )
    published: dict[str, bool | None] = {
        "heads of the last layer attend to different regions": bool(
            mean.heads_patches < FEW and mean.heads_correlation < DIFFERENT
        )
    }
    published |= dict.fromkeys(SOONER.values())
    others = []
    if deleted is None:
        text += " No patches were deleted, because the model predicts no classes."
        for earlier in options.out.glob("rollout_deletion.*"):  # of a model with a classifier
            earlier.unlink()
    else:
        differences = {order: means[f"area, {order}"] - means["area, most rollout"] for order in SOONER}
        answers = {order: mean_difference(difference) for order, difference in differences.items()}
        published |= {SOONER[order]: sooner for order, (_, sooner) in answers.items()}
        areas = {order: mean[f"area, {order}"] for order in orders}
        text += (
            f" As patches are deleted, the mean probability of the predicted class is {areas['most rollout']:.3f} if those "
            f"with most rollout go first and {areas['most class attention']:.3f} if those with most class attention go first; "
            f"compared with most rollout, it is {answers['random'][0]} higher in random order and "
            f"{answers['least rollout'][0]} higher if those with least rollout go first (mean and 95 % interval, photographs: "
            f"{len(means)})."
        )
        others = save_figure(root_figure(deleted.plot()), options.out / "rollout_deletion", file_formats(options.format))
        curves = deleted.to_dataframe().to_csv(index=False, float_format="%.6g")
        others.append(write_bytes(options.out / "rollout_deletion.csv", curves.encode()))
    shown = None if rolled.images is None else rolled.images[:SHOWN]
    figure = plot_class_attention(heads.maps[:SHOWN], shown, rollout=rollout[:SHOWN])
    provenance = merged_provenance(rolled.provenance, heads.provenance, {"options": {"orders": list(orders)}})
    keep("rollout", figure, table, Finding(text, published), provenance, options, *others)


if __name__ == "__main__":
    run_study(main)
