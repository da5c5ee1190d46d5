"""Trains the small models that the studies `position_similarity` and `hybrid` compare; they differ in one choice each.

    python -m analyses.train_variants DATA --work out/variants

Each is a smaller version of `train_demo`'s model, trained for less time, with the same recipe and seed as the others. Two
differences remain: if no position embedding is added to the tokens (`none` and `relative`), the second task (see
`masking.Reconstruction`) asks for patches by a table of its own; and a hybrid's ResNet sees some of the patches that are hidden
from its layers. The folder `--out` receives the weights in float16, and `variants.csv` with their accuracy on `val`, computed
in float32, and the command that trains each one; the folder `--work` receives the output of `train_demo`. An interrupted
training is continued by the same command. Options after `--` are passed to `train_demo`.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from analyses import train_demo
from analyses.small_images import read_split
from analyses.training import accuracy
from vit_probe import InputError, load_model
from vit_probe.atomic_io import writable_folder, write_bytes
from vit_probe.cli.study import run_study, single_command

VARIANTS = {
    "none": {"position": "none", "stem": "patches"},
    "learned_1d": {"position": "learned_1d", "stem": "patches"},
    "learned_2d": {"position": "learned_2d", "stem": "patches"},
    "relative": {"position": "relative", "stem": "patches"},
    "sincos_2d": {"position": "sincos_2d", "stem": "patches"},
    "hybrid": {"position": "learned_1d", "stem": "hybrid"},
}
SMALL = "--width 64 --depth 6 --heads 4 --set epochs=16 --set warmup=1 --set full_epochs=1 --set batch_size=96"
FOLDER = Path(__file__).parent / "variants"


def read_variants(folder: Path) -> pd.DataFrame:
    """The table of trained variants, indexed by name.

    Raises:
        InputError: If the folder has no table, or the table lacks a variant.
    """
    if not (folder / "variants.csv").is_file():
        raise InputError(f"there is no {folder}/variants.csv; `python -m analyses.train_variants DATA` makes it")
    table = pd.read_csv(folder / "variants.csv", index_col="variant")
    if absent := [name for name in VARIANTS if name not in table.index]:
        raise InputError(f"{folder}/variants.csv lacks {', '.join(absent)}; rerun the command that started it to continue")
    return table


def main(
    data: Annotated[Path, typer.Argument(help="Folder with `train` and `val`, as for `train_demo`.")],
    more: Annotated[list[str] | None, typer.Argument(help="After `--`: further options of `train_demo`.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the weights and `variants.csv`.")] = FOLDER,
    work: Annotated[Path, typer.Option(help="Folder for the states and logs of the trainings.")] = Path("out/variants"),
    seed: Annotated[int, typer.Option(help="Seed of every training.")] = 0,
) -> None:
    """Trains the small models that the studies compare."""
    writable_folder(out)
    rows = []
    for name, kind in VARIANTS.items():
        chosen = ["--position", kind["position"], "--stem", kind["stem"]]
        options = [*SMALL.split(), *chosen, "--set", f"seed={seed}", *(more or [])]
        single_command(train_demo.main)([str(data), *options, "--out", str(work / name)], standalone_mode=False)
        shutil.copyfile(work / name / "model.safetensors", out / f"{name}.safetensors")
        model: Any = load_model(out / f"{name}.safetensors")
        log = pd.read_csv(work / name / "log.csv")
        val = read_split(data / "val", model.config.image_size[0])
        top1, top5 = accuracy(model, val)
        rows.append(
            dict(variant=name)
            | kind
            | dict(epochs=len(log), parameters=sum(p.numel() for p in model.parameters() if p.requires_grad))
            | dict(top1=top1, top5=top5, images=len(val.labels), seconds=round(log.seconds.sum()), seed=seed)
            | dict(command=shlex.join(["python", "-m", "analyses.train_demo", "DATA", *options]))
        )
        table = pd.DataFrame(rows).to_csv(index=False, float_format="%.6g")
        write_bytes(out / "variants.csv", table.encode())


if __name__ == "__main__":
    run_study(main)
