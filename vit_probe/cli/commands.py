"""The command `vit-probe`. Everything heavy is imported when a command needs it, so that help appears at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vit_probe.cli import console as terminal
from vit_probe.cli import setup as steps
from vit_probe.cli.options import (
    AfterLayers,
    BatchSize,
    Components,
    Count,
    Device,
    Discard,
    Formats,
    Fusion,
    ImagePaths,
    Kind,
    Limit,
    Model,
    MorePaths,
    OnError,
    Out,
    Prefix,
    Resume,
    SortedLayers,
    Spread,
)
from vit_probe.errors import InputError

if TYPE_CHECKING:
    from vit_probe.runner.distributed import Processes

__all__ = ["app", "main"]

app = typer.Typer(
    help="Look inside Vision Transformers: measurements to trust, figures to publish.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_OUT = Path("figures-out")


@app.command()
def figures(
    context: typer.Context,
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
    processes: Processes = context.obj
    with processes.barrier():
        folder, formats, run = steps.open_run(
            processes, model, images, paths, out, limit, format, batch_size, device, on_error, shows_images=True
        )
        from vit_probe.cli.export import write_analysis, write_figure7, write_run
        from vit_probe.measures import patch_filters, position_similarity
        from vit_probe.measures.attention_distance import AttentionDistance
        from vit_probe.measures.rollout import AttentionRollout

        distance = AttentionDistance(run.grid, windows=run.windows)
        rollout = steps.skip_unsupported(
            "rollout is", lambda: AttentionRollout(run.grid, windows=run.windows), verbose=processes.is_main
        )
    with steps.run_measures(run, folder, resume, *(measure for measure in (distance, rollout) if measure is not None)):
        if not processes.is_main:
            return
        far = distance.compute(run.provenance(distance.options))
        filters = steps.skip_unsupported("patch filters are", lambda: patch_filters(run.model))
        positions = steps.skip_unsupported("position similarity is", lambda: position_similarity(run.model))
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
    context: typer.Context,
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
    spread: Spread = False,
    layers: SortedLayers = None,
) -> None:
    """Mean attention distance of every head, in pixels, against depth."""
    processes: Processes = context.obj
    with processes.barrier():
        folder, formats, run = steps.open_run(processes, model, images, paths, out, limit, format, batch_size, device, on_error)
        from vit_probe.cli.export import root_figure, write_analysis
        from vit_probe.measures.attention_distance import AttentionDistance
        from vit_probe.plots import plot_sorted_heads, save_figure

        if wrong := [layer for layer in layers or () if not 0 <= layer < len(run.layers)]:
            raise InputError(f"--sorted-layer {wrong[0]}: the model has layers 0 to {len(run.layers) - 1}")
        measure = AttentionDistance(run.grid, prefix=prefix, windows=run.windows)
    with steps.run_measures(run, folder, resume, measure):
        if not processes.is_main:
            return
        result = measure.compute(run.provenance(measure.options))
        files = write_analysis(result, result.plot(spread=spread), folder, "attention_distance", formats)
        if layers:
            axes = plot_sorted_heads(result.to_dataframe(), layers=layers)
            files += save_figure(root_figure(axes), folder / "attention_distance_sorted", formats)
        terminal.report(files, result.summary())


@app.command()
def entropy(
    context: typer.Context,
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
    spread: Spread = False,
) -> None:
    """Entropy of every head's attention, in nats, against depth; the table has its distance and masses too."""
    processes: Processes = context.obj
    with processes.barrier():
        folder, formats, run = steps.open_run(processes, model, images, paths, out, limit, format, batch_size, device, on_error)
        from vit_probe.cli.export import write_analysis
        from vit_probe.measures.attention_distance import AttentionDistance
        from vit_probe.measures.attention_entropy import AttentionEntropy
        from vit_probe.measures.head_table import head_table

        far = AttentionDistance(run.grid, prefix=prefix, windows=run.windows)
        broad = AttentionEntropy(run.grid, windows=run.windows)
    with steps.run_measures(run, folder, resume, far, broad):
        if not processes.is_main:
            return
        result = broad.compute(run.provenance(broad.options))
        table = head_table(far.compute(run.provenance(far.options)), result)
        files = write_analysis(result, result.plot(spread=spread), folder, "attention_entropy", formats, table=table)
        terminal.report(files, result.summary())


@app.command()
def filters(
    context: typer.Context, model: Model = "demo", out: Out = _OUT, format: Formats = None, components: Components = 28
) -> None:
    """Principal components of the patch-embedding filters."""
    if not context.obj.is_main:
        return
    folder, formats, _ = steps.prepare(None, None, out, None, format)
    from vit_probe.cli.export import write_analysis
    from vit_probe.measures import patch_filters

    result = patch_filters(steps.load(model), components=components)
    terminal.report(write_analysis(result, result.plot(), folder, "patch_filters", formats), result.summary())


@app.command()
def positions(
    context: typer.Context,
    model: Model = "demo",
    out: Out = _OUT,
    format: Formats = None,
    after_layers: AfterLayers = None,
) -> None:
    """Cosine similarity of positions."""
    if not context.obj.is_main:
        return
    folder, formats, _ = steps.prepare(None, None, out, None, format)
    from vit_probe.cli.export import write_analysis
    from vit_probe.measures import position_similarity

    result = position_similarity(steps.load(model), after_layers=after_layers)
    terminal.report(write_analysis(result, result.plot(), folder, "position_similarity", formats), result.summary())


@app.command()
def rollout(
    context: typer.Context,
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
    kind: Kind = "pairs",
    count: Count = 8,
) -> None:
    """Attention rollout: what reaches the class token, over each photograph."""
    processes: Processes = context.obj
    with processes.barrier():
        from vit_probe.cli.export import write_analysis
        from vit_probe.measures.base.per_image import SHOWN_IMAGES
        from vit_probe.measures.rollout import AttentionRollout

        if not 0 <= discard_ratio < 1:
            raise InputError(f"--discard-ratio must lie in [0, 1), got {discard_ratio}")
        if count > SHOWN_IMAGES:
            raise InputError(f"--count must be at most {SHOWN_IMAGES}, got {count}")
        folder, formats, run = steps.open_run(
            processes, model, images, paths, out, limit, format, batch_size, device, on_error, shows_images=True
        )
        measure = AttentionRollout(run.grid, head_fusion=head_fusion, discard_ratio=discard_ratio, windows=run.windows)
    with steps.run_measures(run, folder, resume, measure):
        if not processes.is_main:
            return
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
