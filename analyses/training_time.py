"""Attention distance and position similarity during training, from before the first epoch to the end.

Published (Dosovitskiy et al. 2021, arXiv:2010.11929): before training, position embeddings say nothing about where patches lie
(section 3.1); nearness is learned (figure 10, models trained for 7 and 14 epochs). Criteria used here: the similarity of two
position embeddings and the distance of their patches correlate within 0.1 of 0 before training, and below -0.5 at the end.

About attention distance, the paper says nothing before the end of training; its development is reported here but not judged.
The bundled model did not start from purely random weights: in its first three layers, queries and keys began alike (Trockman &
Kolter 2023, arXiv:2305.09828). The snapshots were written by `train_demo`.

    python -m analyses.training_time --model demo
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from analyses.study import Finding, in_first_third, keep
from vit_probe import InputError, load_model, mean_attention_distance, position_similarity
from vit_probe.cli.study import StudyOptions, load, run_study
from vit_probe.measures.position_similarity import position_nearness
from vit_probe.plots.training_time import plot_training_time
from vit_probe.runner.resume import differing
from vit_probe.runner.run import model_config

SNAPSHOTS = Path(__file__).parent / "snapshots"


def main(
    options: StudyOptions,
    epochs: Annotated[int, typer.Option(help="Number of epochs that the model was trained for.")] = 24,
    snapshots: Annotated[Path, typer.Option(help="Folder of its earlier states, `epoch-NUMBER.safetensors`.")] = SNAPSHOTS,
) -> None:
    """Draw attention distance and position similarity from before training to its end."""
    if not (snapshots / "epoch-000.safetensors").is_file():
        raise InputError(f"there is no {snapshots}/epoch-000.safetensors; pass the folder of a training's snapshots")
    files = {int(path.stem.removeprefix("epoch-")): str(path) for path in sorted(snapshots.glob("epoch-*.safetensors"))}
    if max(files) >= epochs:
        raise InputError(
            f"--epochs {epochs}: {snapshots} holds the weights after {max(files)} epochs; pass the number of epochs of --model"
        )
    model, photographs = load(options)
    networks = {epoch: load_model(name) for epoch, name in files.items()} | {epochs: model}
    configs = {epoch: model_config(network) for epoch, network in networks.items()}
    configs = {epoch: config if isinstance(config, dict) else {} for epoch, config in configs.items()}
    for epoch, config in configs.items():
        if names := differing(config, configs[epochs]):
            raise InputError(
                f"{files[epoch]} differs from {options.model} in its {names}; pass the snapshots of {options.model}"
            )
    frames, maps, provenance, rows = {}, {}, {}, list[dict[str, Any]]()
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
    keep("training_time", plot_training_time(frames, maps), table, found(table), provenance, options)


def found(table: pd.DataFrame) -> Finding:
    """The finding, from the table of all snapshots."""
    first, last = table.iloc[0], table.iloc[-1]
    near = [f"{row.nearness:.2f}" for row in (first, last)]
    neighbours = [f"{row.neighbours:.2f}" for row in (first, last)]
    distances = [f"{row.early_nearest:.1f} to {row.early_farthest:.1f} px" for row in (first, last)]
    text = (
        f"The similarity of position embeddings and the distance of their patches correlate at {near[0]} before training and "
        f"at {near[1]} after {last.epoch:.0f} epochs; the mean similarity of neighbours is {neighbours[0]} and "
        f"{neighbours[1]}. In the first third of the layers, the attention distances of heads range from {distances[0]} before "
        f"training, and from {distances[1]} after."
    )
    published = {
        "before training, the similarity of positions says nothing about nearness": bool(abs(first.nearness) < 0.1),
        "at the end of training, it does": bool(last.nearness < -0.5),
    }
    return Finding(text, published)


if __name__ == "__main__":
    run_study(main)
