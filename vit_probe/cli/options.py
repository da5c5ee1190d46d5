"""The options of the command `vit-probe`, with what `--help` says of them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = [
    "AfterLayers",
    "BatchSize",
    "Components",
    "Count",
    "Device",
    "Discard",
    "Format",
    "Formats",
    "Fusion",
    "ImagePaths",
    "Kind",
    "Limit",
    "Model",
    "MorePaths",
    "OnError",
    "Out",
    "Prefix",
    "Resume",
    "SortedLayers",
    "Spread",
]


class Format(StrEnum):
    png = "png"
    pdf = "pdf"
    svg = "svg"


Model = Annotated[
    str,
    typer.Option(
        help="demo (the bundled model), a checkpoint file or folder, hf:ORG/NAME, timm:NAME, torchvision:NAME or "
        "open_clip:ARCH/TAG; see `vit-probe models`."
    ),
]
ImagePaths = Annotated[
    list[Path] | None,
    typer.Option(
        "--images", metavar="PATH", help="Photographs, or folders of them; without any, sample photographs and crops of them."
    ),
]
MorePaths = Annotated[list[Path] | None, typer.Argument(help="More photographs or folders.")]
Out = Annotated[Path, typer.Option(help="Folder for the figures and their numbers.")]
Limit = Annotated[int, typer.Option(min=1, help="Use at most this many images.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a forward pass.")]
Formats = Annotated[list[Format] | None, typer.Option("--format", help="May be repeated; png without any.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Prefix = Annotated[
    Literal["renormalize", "drop"], typer.Option(help="What becomes of attention paid to class token and registers.")
]
Components = Annotated[int, typer.Option(min=1, help="Principal components to show.")]
Fusion = Annotated[
    Literal["mean", "max", "min"], typer.Option(help="How the heads of a layer become one; the paper's is mean.")
]
Discard = Annotated[float, typer.Option(help="Part of each layer's smallest entries set to zero, in [0, 1).")]
Count = Annotated[int, typer.Option(min=1, help="Images to draw; the numbers of all are written.")]
OnError = Annotated[
    Literal["stop", "skip"], typer.Option(help="What becomes of images that cannot be read: end the run, or leave them out.")
]
AfterLayers = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Compare the tokens of a constant image after so many layers, instead of the table of position embeddings; "
        "without a table, half of the layers.",
    ),
]
Spread = Annotated[bool, typer.Option("--spread", help="Draw the standard deviation over images.")]
SortedLayers = Annotated[
    list[int] | None,
    typer.Option("--sorted-layer", help="Also draw this layer's heads in order of distance; may be repeated."),
]
Kind = Annotated[Literal["pairs", "heatmap"], typer.Option(help="Attention over black, as in the paper, or a heat map.")]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with a run into the same folder, and in as many processes, that was interrupted."),
]
