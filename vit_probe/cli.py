"""The command `vit-probe`. Everything heavy is imported when a command needs it, so that help appears at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from vit_probe import terminal
from vit_probe.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from vit_probe.run import AttentionRun
    from vit_probe.tiles import AttentionObserver

__all__ = ["app", "main"]

app = typer.Typer(
    help="Look inside Vision Transformers: measurements to trust, figures to publish.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run into the same folder that was interrupted.")]
_OUT = Path("figures-out")
_Made = TypeVar("_Made")


@app.command()
def figures(
    paths: MorePaths = None,
    model: Model = "demo",
    images: ImagePaths = None,
    out: Out = _OUT,
    limit: Limit = 128,
    batch_size: BatchSize = 16,
    format: Formats = None,
    device: Device = "auto",
    on_error: OnError = "stop",
    resume: Resume = False,
) -> None:
    """All four analyses in one pass, and the three-panel sheet of the ViT paper's figure 7."""
    folder, formats, photographs = _prepare(images, paths, out, limit, format)
    loaded = _load(model)
    from vit_probe.measures import patch_filters, position_similarity
    from vit_probe.measures.attention_distance import AttentionDistance
    from vit_probe.measures.rollout import SHOWN_IMAGES, AttentionRollout
    from vit_probe.output import write_analysis, write_figure7, write_run

    run = _attention_run(loaded, photographs, batch_size, device, on_error, keep_images=SHOWN_IMAGES)
    filters = _if_possible("patch filters are", lambda: patch_filters(loaded))
    positions = _if_possible("position similarity is", lambda: position_similarity(loaded))
    distance = AttentionDistance(run.grid, windows=run.windows)
    rollout = _if_possible("rollout is", lambda: AttentionRollout(run.grid, windows=run.windows))
    _observe(run, folder, resume, *(measure for measure in (distance, rollout) if measure is not None))
    far = distance.compute(run.provenance(distance.options))
    files = write_analysis(far, far.plot(), folder, "attention_distance", formats)
    options = distance.options | {"limit": limit, "batch_size": batch_size}
    if filters is not None:
        options["components"] = len(filters.filters)
        files += write_analysis(filters, filters.plot(), folder, "patch_filters", formats)
    if positions is not None:
        files += write_analysis(positions, positions.plot(), folder, "position_similarity", formats)
    if rollout is not None:
        options |= rollout.options
        rolled = rollout.compute(run.provenance(rollout.options), names=run.images.names, images=run.images.kept())
        files += write_analysis(rolled, rolled.plot(), folder, "rollout", formats)
    if filters is not None:
        files += write_figure7(filters, positions, far, folder, formats)
    files.append(write_run(far.provenance | {"options": options}, files, folder))
    terminal.report(files, far.summary())


@app.command()
def distance(
    paths: MorePaths = None,
    model: Model = "demo",
    images: ImagePaths = None,
    out: Out = _OUT,
    limit: Limit = 128,
    batch_size: BatchSize = 16,
    format: Formats = None,
    device: Device = "auto",
    on_error: OnError = "stop",
    resume: Resume = False,
    prefix: Prefix = "renormalize",
    spread: Annotated[bool, typer.Option("--spread", help="Draw the standard deviation over images.")] = False,
    layers: Annotated[
        list[int] | None,
        typer.Option("--sorted-layer", help="Also draw this layer's heads in order of distance; may be repeated."),
    ] = None,
) -> None:
    """Mean attention distance of every head, in pixels, against depth."""
    folder, formats, photographs = _prepare(images, paths, out, limit, format)
    loaded = _load(model)
    from vit_probe.measures.attention_distance import AttentionDistance
    from vit_probe.output import root_figure, write_analysis
    from vit_probe.plots import plot_sorted_heads, save_figure

    run = _attention_run(loaded, photographs, batch_size, device, on_error)
    if wrong := [layer for layer in layers or () if not 0 <= layer < len(run.layers)]:
        raise InputError(f"--sorted-layer {wrong[0]}: the model has layers 0 to {len(run.layers) - 1}")
    measure = AttentionDistance(run.grid, prefix=prefix, windows=run.windows)
    _observe(run, folder, resume, measure)
    result = measure.compute(run.provenance(measure.options))
    files = write_analysis(result, result.plot(spread=spread), folder, "attention_distance", formats)
    if layers:
        axes = plot_sorted_heads(result.to_dataframe(), layers=layers)
        files += save_figure(root_figure(axes), folder / "attention_distance_sorted", formats)
    terminal.report(files, result.summary())


@app.command()
def filters(model: Model = "demo", out: Out = _OUT, format: Formats = None, components: Components = 28) -> None:
    """Principal components of the patch-embedding filters."""
    folder, formats, _ = _prepare(None, None, out, None, format)
    from vit_probe.measures import patch_filters
    from vit_probe.output import write_analysis

    result = patch_filters(_load(model), components=components)
    terminal.report(write_analysis(result, result.plot(), folder, "patch_filters", formats), result.summary())


@app.command()
def positions(
    model: Model = "demo",
    out: Out = _OUT,
    format: Formats = None,
    after_layers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Compare the tokens of a constant image after so many layers, instead of the table of position embeddings; "
            "without a table, half of the layers.",
        ),
    ] = None,
) -> None:
    """Cosine similarity of positions."""
    folder, formats, _ = _prepare(None, None, out, None, format)
    from vit_probe.measures import position_similarity
    from vit_probe.output import write_analysis

    result = position_similarity(_load(model), after_layers=after_layers)
    terminal.report(write_analysis(result, result.plot(), folder, "position_similarity", formats), result.summary())


@app.command()
def rollout(
    paths: MorePaths = None,
    model: Model = "demo",
    images: ImagePaths = None,
    out: Out = _OUT,
    limit: Limit = 128,
    batch_size: BatchSize = 16,
    format: Formats = None,
    device: Device = "auto",
    on_error: OnError = "stop",
    resume: Resume = False,
    head_fusion: Fusion = "mean",
    discard_ratio: Discard = 0.0,
    kind: Annotated[
        Literal["pairs", "heatmap"], typer.Option(help="Attention over black, as in the paper, or a heat map.")
    ] = "pairs",
    count: Count = 8,
) -> None:
    """Attention rollout: what reaches the class token, over each photograph."""
    from vit_probe.measures.rollout import SHOWN_IMAGES, AttentionRollout
    from vit_probe.output import write_analysis

    if not 0 <= discard_ratio < 1:
        raise InputError(f"--discard-ratio must lie in [0, 1), got {discard_ratio}")
    if count > SHOWN_IMAGES:
        raise InputError(f"--count must be at most {SHOWN_IMAGES}, got {count}")
    folder, formats, photographs = _prepare(images, paths, out, limit, format)
    loaded = _load(model)
    run = _attention_run(loaded, photographs, batch_size, device, on_error, keep_images=SHOWN_IMAGES)
    measure = AttentionRollout(run.grid, head_fusion=head_fusion, discard_ratio=discard_ratio, windows=run.windows)
    _observe(run, folder, resume, measure)
    result = measure.compute(run.provenance(measure.options), names=run.images.names, images=run.images.kept())
    axes = result.plot(kind=kind, count=count)
    terminal.report(write_analysis(result, axes, folder, "rollout", formats), result.summary())


@app.command()
def models() -> None:
    """What --model can name."""
    rows = [
        ("demo", "the bundled model, which is taken without --model"),
        ("FILE.npz", "Google's layout (vision_transformer, AugReg, big_vision), plain or hybrid with a BiT ResNet"),
        ("FILE.safetensors, .pt, .pth", "a state dict with the names of timm, transformers, torchvision or vit_probe"),
        ("FOLDER", "as transformers or timm writes it; models that vit_probe does not have itself need that library"),
        ("hf:ORG/NAME", "such a folder from the Hugging Face Hub, hf:facebook/dinov2-small for one"),
        ("timm:NAME", "timm's weights from the Hub, timm:vit_base_patch16_224.augreg_in21k for one"),
        ("torchvision:NAME[.WEIGHTS]", "a classifier of torchvision, torchvision:vit_b_16.IMAGENET1K_SWAG_E2E_V1 for one"),
        ("open_clip:ARCH/TAG", "open_clip's image tower, open_clip:ViT-B-32/laion2b_s34b_b79k for one; also ARCH/PATH"),
    ]
    terminal.print_table(["--model", "what is read"], rows)


def main() -> None:
    """Runs the command."""
    terminal.run(app)


def _prepare(
    images: list[Path] | None,
    more: list[Path] | None,
    out: Path,
    limit: int | None,
    formats: Sequence[Format] | None,
) -> tuple[Path, list[str], list[Any]]:
    """Everything that can be checked before the model is loaded: the images there are, the output folder, the formats."""
    from vit_probe.files import writable_folder

    photographs: list[Any] = []
    if limit is not None:
        from vit_probe.images import find_images, sample_photographs

        sources = [*(images or ()), *(more or ())]
        photographs = list(find_images(sources)[:limit]) if sources else list(sample_photographs(min(limit, 128)))
    return writable_folder(out), [name.value for name in dict.fromkeys(formats or [Format.png])], photographs


def _load(model: str) -> nn.Module:
    from vit_probe.checkpoints import load_model

    return load_model(model)


def _if_possible(what: str, make: Callable[[], _Made]) -> _Made | None:
    """What `make` returns; None, with a note, where this model does not have it."""
    try:
        return make()
    except InputError as error:
        terminal.complain(f"note: {what} left out: {error}")
        return None


def _attention_run(
    model: nn.Module, images: list[Any], batch_size: int, device: str, on_error: Literal["stop", "skip"], keep_images: int = 0
) -> AttentionRun:
    from vit_probe.run import AttentionRun

    return AttentionRun(model, images, batch_size=batch_size, device=device, on_error=on_error, keep_images=keep_images)


def _observe(run: AttentionRun, folder: Path, resume: bool, *measures: AttentionObserver) -> None:
    """Keeps the state in `folder` until the run is through."""
    state = folder / "run-state.safetensors"
    if not resume:
        state.unlink(missing_ok=True)
    with terminal.progress(run.images.count) as advance:
        run.observe(*measures, progress=advance, state=state)
    state.unlink()
    for name, reason in run.images.skipped:
        terminal.complain(f"note: {name} is left out: {reason}")
