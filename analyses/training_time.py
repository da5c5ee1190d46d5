"""What training does to attention distance and to position similarity, from before the first epoch to the end.

Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1 (before training, position embeddings say nothing of where patches lie)
and figure 10 (models trained for 7 and 14 epochs). Expected: nearness is learned. As published here: similarity and distance of
two patches correlate within 0.1 of 0 before training and below -0.5 at the end. Of attention distance the paper says nothing
before the end of training; what it does here is told, and not judged. The bundled model did not start at random: in its first
three layers queries and keys began alike (Trockman & Kolter 2023, arXiv:2305.09828). The snapshots are `train_demo`'s.

    python -m analyses.training_time --model demo
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from analyses.study import Finding, in_first_third, keep
from vit_probe import InputError, mean_attention_distance, position_similarity
from vit_probe.cli import setup as steps
from vit_probe.cli.console import run
from vit_probe.cli.options import Formats, ImagePaths, Limit, Model, Out
from vit_probe.measures.position_similarity import position_nearness
from vit_probe.plots.training_time import plot_training_time
from vit_probe.runner.resume import differing
from vit_probe.runner.run import model_config

SNAPSHOTS = Path(__file__).parent / "snapshots"


def main(
    model: Model = "demo",
    epochs: Annotated[int, typer.Option(help="Epochs that the model was trained for.")] = 24,
    snapshots: Annotated[Path, typer.Option(help="Folder of its earlier states, `epoch-NUMBER.safetensors`.")] = SNAPSHOTS,
    images: ImagePaths = None,
    out: Out = Path("figures"),
    limit: Limit = 128,
    format: Formats = None,
) -> None:
    """Draws attention distance and position similarity from before training to its end."""
    folder, formats, photographs = steps.prepare(images, None, out, limit, format)
    if not (snapshots / "epoch-000.safetensors").is_file():
        raise InputError(f"there is no {snapshots}/epoch-000.safetensors; name the folder of a training's snapshots")
    files = {int(path.stem.removeprefix("epoch-")): str(path) for path in sorted(snapshots.glob("epoch-*.safetensors"))}
    if max(files) >= epochs:
        raise InputError(f"--epochs {epochs}: {snapshots} holds the weights after {max(files)}; tell after how many --model is")
    frames, maps, provenance, rows = {}, {}, {}, list[dict[str, Any]]()
    networks = {epoch: steps.load(name) for epoch, name in (files | {epochs: model}).items()}
    configs = {epoch: model_config(network) for epoch, network in networks.items()}
    configs = {epoch: config if isinstance(config, dict) else {} for epoch, config in configs.items()}
    for epoch, config in configs.items():
        if names := differing(config, configs[epochs]):
            raise InputError(f"{files[epoch]} is of another training, with another {names}; name the snapshots of {model}")
    for epoch, network in networks.items():
        title = f"epoch {epoch}" if epoch else "before training"
        distance, positions = mean_attention_distance(network, photographs), position_similarity(network)
        frames[title], maps[title], provenance[title] = distance.to_dataframe(), positions.similarity, distance.provenance
        heads = frames[title].distance
        early = heads[in_first_third(frames[title])]
        rows.append(
            dict(epoch=epoch, early_nearest=early.min(), early_farthest=early.max(), early_mean=early.mean(), mean=heads.mean())
            | dict(uniform_distance=distance.uniform_distance[0], neighbours=positions.summary()["neighbours"].iloc[0])
            | dict(nearness=position_nearness(positions.similarity))
        )
    table = pd.DataFrame(rows)
    keep("training_time", plot_training_time(frames, maps), table, found(table), provenance, folder, formats)


def found(table: pd.DataFrame) -> Finding:
    """Of the table of all snapshots."""
    first, last = table.iloc[0], table.iloc[-1]
    near = [f"{row.nearness:.2f}" for row in (first, last)]
    alike = [f"{row.neighbours:.2f}" for row in (first, last)]
    far = [f"{row.early_nearest:.1f} to {row.early_farthest:.1f} px" for row in (first, last)]
    text = (
        f"Similarity and distance of positions correlate at {near[0]} before training, at {near[1]} after {last.epoch:.0f} "
        f"epochs; the mean similarity of neighbours is {alike[0]} and {alike[1]}. In the first third of the layers the heads "
        f"look {far[0]} far before, {far[1]} after."
    )
    published = {
        "before training, similarity of positions tells nothing of nearness": bool(abs(first.nearness) < 0.1),
        "in the end it does": bool(last.nearness < -0.5),
    }
    return Finding(text, published)


if __name__ == "__main__":
    run(main)
