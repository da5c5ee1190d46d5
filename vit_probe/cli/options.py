"""The options that the commands share, with what `--help` says of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

__all__ = ["Format", "ModelOptions", "RunOptions", "StudyOptions", "with_options"]


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
Images = Annotated[
    list[Path] | None,
    typer.Option("--images", metavar="PATH", help="Photographs or folders of photographs. Default: sample photographs."),
]
Out = Annotated[Path, typer.Option(help="Folder for the figures and their numbers.")]
Limit = Annotated[int, typer.Option(min=1, help="Use at most this many images.")]
Formats = Annotated[list[Format] | None, typer.Option("--format", help="May be repeated. Default: png.")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Of a command that looks at the weights alone."""

    model: Model = "demo"
    out: Out = Path("figures-out")
    format: Formats = None


@dataclass(frozen=True, kw_only=True)
class RunOptions(ModelOptions):
    """Of a command that takes images through the model."""

    paths: Annotated[list[Path] | None, typer.Argument(help="More photographs or folders.")] = None
    images: Images = None
    limit: Limit = 128
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 16
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto"
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="End the run at an image that cannot be read, or skip the image.")
    ] = "stop"
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run in the same folder, with as many processes.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Of a study in `analyses/`."""

    model: Model = "demo"
    images: Images = None
    out: Out = Path("figures")
    limit: Limit = 128
    format: Formats = None


def with_options(function: Callable[..., Any], *more: inspect.Parameter) -> Callable[..., None]:
    """A command whose options are the arguments of `function`, with a group of options in one argument spelt out.

    Args:
        function: Each of its arguments whose type is a dataclass of options, such as `RunOptions`, is given as an object, and
            appears on the command line as the dataclass's fields. An argument called `options` that is no dataclass receives
            `more` as a dictionary.
        more: Further options.

    Returns:
        A function for `typer`.
    """
    signature = inspect.signature(function, eval_str=True)
    groups: dict[str, Any] = {
        name: one.annotation for name, one in signature.parameters.items() if is_dataclass(one.annotation)
    }
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name in groups:
            hints = get_type_hints(groups[name], include_extras=True)
            for field in fields(groups[name]):
                default = inspect.Parameter.empty if field.default is MISSING else field.default
                parameters.append(inspect.Parameter(field.name, keyword, default=default, annotation=hints[field.name]))
        elif parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            parameters.append(parameter.replace(kind=keyword))
    parameters += more

    def command(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        function(**given)

    command.__name__, command.__doc__, command.__module__ = function.__name__, function.__doc__, function.__module__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command
