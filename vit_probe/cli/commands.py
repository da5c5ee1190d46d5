"""The command `vit-probe`. Slow imports wait until a command needs them, so that help appears at once."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from vit_probe.cli import console, setup
from vit_probe.cli.options import ModelOptions, RunOptions, with_options
from vit_probe.errors import InputError
from vit_probe.measures.base.discovery import MeasureFile, Option, measure_files

if TYPE_CHECKING:
    from vit_probe.runner.distributed import ProcessGroup

__all__ = ["app", "main"]

app = typer.Typer(
    help="Look inside Vision Transformers: measurements to trust, figures to publish.",
    epilog=console.EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def figures(context: typer.Context, options: RunOptions) -> None:
    """The figure 7 of the ViT paper and its three panels, and attention rollout, in one pass."""
    processes: ProcessGroup = context.obj
    with processes.barrier():
        formats = setup.file_formats(options.format)
        run = setup.open_run(context, options, shows_images=True)
        from vit_probe.cli.export import write_figure7, write_result, write_run
        from vit_probe.measures.attention_distance import mean_attention_distance
        from vit_probe.measures.patch_filters import patch_filters
        from vit_probe.measures.position_similarity import position_similarity
        from vit_probe.measures.rollout import AttentionRollout

        distance = mean_attention_distance.observer(run.grid, windows=run.windows)
        rollout = setup.skip_unsupported(
            "rollout is", lambda: AttentionRollout(run.grid, windows=run.windows), verbose=processes.is_main
        )
    with setup.run_measures(run, options, *(measure for measure in (distance, rollout) if measure is not None)):
        if not processes.is_main:
            return
        folder = options.out
        distances = run.result(distance)
        filters = setup.skip_unsupported("patch filters are", lambda: patch_filters(run.model))
        positions = setup.skip_unsupported("position similarity is", lambda: position_similarity(run.model))
        files = write_result(distances, distances.plot, folder, formats)
        used = distance.options | {"limit": options.limit, "batch_size": options.batch_size}
        if filters is not None:
            used["components"] = len(filters.filters)
            files += write_result(filters, filters.plot, folder, formats)
        if positions is not None:
            files += write_result(positions, positions.plot, folder, formats)
        if rollout is not None:
            used |= rollout.options
            rolled = run.result(rollout)
            files += write_result(rolled, rolled.plot, folder, formats)
        if filters is not None:
            files += write_figure7(filters, positions, distances, folder, formats)
        files.append(write_run(distances.provenance | {"options": used}, files, folder))
        console.report(files, distances.summary())


def models() -> None:
    """What --model can name."""
    rows = [
        ("demo", "the bundled model, which is the default"),
        ("FILE.npz", "Google's layout (vision_transformer, AugReg, big_vision), plain or hybrid with a BiT ResNet"),
        ("FILE.safetensors, .pt, .pth", "a state dict with the names of timm, transformers, torchvision or vit_probe"),
        ("FOLDER", "as transformers or timm writes it; models that vit_probe does not have itself need that library"),
        ("hf:ORG/NAME", "such a folder from the Hugging Face Hub, for example hf:facebook/dinov2-small"),
        ("timm:NAME", "timm's weights from the Hub, for example timm:vit_base_patch16_224.augreg_in21k"),
        ("torchvision:NAME[.WEIGHTS]", "a classifier of torchvision, for example torchvision:vit_b_16.IMAGENET1K_SWAG_E2E_V1"),
        ("open_clip:ARCH/TAG", "open_clip's image tower, for example open_clip:ViT-B-32/laion2b_s34b_b79k; also ARCH/PATH"),
    ]
    console.print_table(["--model", "what is read"], rows)


def _measure_images(one: MeasureFile, context: typer.Context, options: RunOptions, given: Mapping[str, Any]) -> None:
    """The command of a measure that goes over images."""
    own, drawing = _split(one, given)
    processes: ProcessGroup = context.obj
    with processes.barrier():
        from vit_probe.cli.export import write_result
        from vit_probe.measures.base.registry import SHOWN_IMAGES, spec_of

        if not 1 <= drawing.get("count", 1) <= SHOWN_IMAGES:
            raise InputError(f"--count must be from 1 to {SHOWN_IMAGES}, got {drawing['count']}")
        spec, _ = spec_of(_function(one))
        run = setup.open_run(context, options, shows_images=spec.shows_images)
        if wrong := [layer for layer in drawing.get("layers") or () if not 0 <= layer < len(run.layers)]:
            raise InputError(f"--layers {wrong[0]}: the model has layers 0 to {len(run.layers) - 1}")
        assert spec.start is not None
        measure = spec.start(run, **(dict(spec.options) | own))
    with setup.run_measures(run, options, measure):
        if not processes.is_main:
            return
        result = run.result(measure)
        files = write_result(result, lambda: result.plot(**drawing), options.out, setup.file_formats(options.format))
        console.report(files, result.summary())


def _measure_weights(one: MeasureFile, context: typer.Context, options: ModelOptions, given: Mapping[str, Any]) -> None:
    """The command of a measure of the model's weights alone."""
    if not context.obj.is_main:
        return
    own, drawing = _split(one, given)
    folder = setup.output_folder(options.out)
    from vit_probe.checkpoints import load_model
    from vit_probe.cli.export import write_result

    result = _function(one)(load_model(options.model), **own)
    files = write_result(result, lambda: result.plot(**drawing), folder, setup.file_formats(options.format))
    console.report(files, result.summary())


def _function(one: MeasureFile) -> Any:
    return getattr(import_module(f"vit_probe.measures.{one.name}"), one.function)


def _split(one: MeasureFile, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the measure, and those of its picture."""
    values = {
        option.name: _numbers(option, given[option.name]) if _is_list(option) else given[option.name]
        for option in (*one.options, *one.plot_options)
    }
    return tuple({option.name: values[option.name] for option in part} for part in (one.options, one.plot_options))  # type: ignore[return-value]


def _is_list(option: Option) -> bool:
    return any(get_origin(kind) is list for kind in (option.type, *get_args(option.type)))


def _numbers(option: Option, text: str | None) -> list[int] | None:
    """Whole numbers with commas between them."""
    try:
        return None if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise InputError(f"--{option.name} must be whole numbers with commas between them, such as 0,5; got {text!r}") from None


def _parameter(option: Option) -> inspect.Parameter:
    """The option on the command line."""
    flag = f"--{option.name.replace('_', '-')}"
    kinds = get_args(option.type) if get_origin(option.type) is not Literal else ()
    if _is_list(option):
        annotation: Any = Annotated[str | None, typer.Option(flag, metavar="0,5,...", help=option.help)]
    elif option.type is bool:
        annotation = Annotated[bool, typer.Option(flag, help=option.help)]
    else:
        # Where a type has alternatives, such as one side or both, the first is what a command line can say.
        kind = kinds[0] | None if type(None) in kinds else option.type
        annotation = Annotated[kind, typer.Option(flag, help=option.help)]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=annotation)


def _add_measure(one: MeasureFile) -> None:
    """Make the command of a measure from what its source file says."""
    group = RunOptions if one.takes_images else ModelOptions
    work = _measure_images if one.takes_images else _measure_weights

    def command(context: typer.Context, options: Any, **given: Any) -> None:
        work(one, context, options, given)

    command.__annotations__["options"] = group
    more: Sequence[inspect.Parameter] = [_parameter(option) for option in (*one.options, *one.plot_options)]
    app.command(one.command, help=console.unwrapped(one.help))(with_options(command, *more))


app.command()(with_options(figures))
for _one in measure_files().values():
    _add_measure(_one)
app.command()(models)


def main() -> None:
    """Run the command."""
    console.run(app)
