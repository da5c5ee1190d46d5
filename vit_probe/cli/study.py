"""What a study takes from the command line: its options, its program, and the few steps before and after measuring.

A study is a short program that shows one published finding. It is a function of `StudyOptions` (and options of its own), which
`run_study` runs:

    def main(options: StudyOptions) -> None:
        model, photographs = load(options)
        ...

    if __name__ == "__main__":
        run_study(main)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_probe.cli.console import complain, print_table, run, single_command
from vit_probe.cli.export import root_figure
from vit_probe.cli.options import Format, Formats, Images, Limit, Model, ModelOptions, Out, StudyOptions, with_options
from vit_probe.cli.setup import file_formats, find_photographs, output_folder, skip_unsupported

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Format",
    "Formats",
    "Images",
    "Limit",
    "Model",
    "Out",
    "StudyOptions",
    "WeightsStudyOptions",
    "complain",
    "file_formats",
    "find_photographs",
    "load",
    "output_folder",
    "print_table",
    "root_figure",
    "run_study",
    "single_command",
    "skip_unsupported",
    "with_options",
]


@dataclass(frozen=True, kw_only=True)
class WeightsStudyOptions(ModelOptions):
    """Of a study that needs no photographs."""

    out: Out = Path("figures")


def load(options: StudyOptions) -> tuple[nn.Module, list[Any]]:
    """The model and the photographs of a study; everything else that can be wrong is checked before the model is loaded."""
    output_folder(options.out)
    photographs = find_photographs(options.images, options.limit)
    from vit_probe.checkpoints import load_model

    return load_model(options.model), photographs


def run_study(main: Callable[..., Any]) -> None:
    """Run a study as a program: options from the command line, help from its module's docstring, errors as one sentence."""
    run(single_command(with_options(main)))
