"""Which measures come with the package, read from their source: names, options and help without importing torch.

The command line needs them for `--help`, and importing torch takes seconds.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

__all__ = ["PREFIXES", "SHARED_OPTIONS", "MeasureFile", "Option", "exports", "measure_files"]

PREFIXES = Literal["renormalize", "drop"]

_FOLDER = Path(__file__).parents[1]
_DECORATORS = {
    "offset_measure": ("base/per_head.py", "HeadResult"),
    "head_measure": ("base/per_head.py", "HeadResult"),
    "layer_measure": ("base/per_layer.py", "LayerResult"),
    "streaming_measure": (None, None),
    "model_measure": (None, None),
}
_SECTION = re.compile(r"\n\n(?:Args|Returns|Raises|References|Examples):\n")
_NAMES = {
    "Literal": Literal,
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "None": None,
    "Sequence": list,
    "tuple": tuple,
}


@dataclass(frozen=True)
class Option:
    """A keyword argument that can be given on the command line.

    Args:
        name: Of the argument.
        type: Its type.
        default: Its default.
        help: What the docstring says of it.
    """

    name: str
    type: Any
    default: Any
    help: str


_PER_IMAGE = Option("per_image", bool, False, "Keep the value of every image, too, not only their mean and spread.")
SHARED_OPTIONS = {
    "offset_measure": (
        Option(
            "prefix",
            PREFIXES,
            "renormalize",
            "What happens to attention paid to prefix tokens: `renormalize` rescales the weights on patches to sum to 1, so "
            "that a head that parks attention on the class token is not mistaken for a local one; `drop` leaves them unscaled.",
        ),
        _PER_IMAGE,
    ),
    "head_measure": (_PER_IMAGE,),
    "layer_measure": (_PER_IMAGE,),
    "streaming_measure": (),
    "model_measure": (),
}
"""Options that all measures of a decorator have."""


@dataclass(frozen=True)
class MeasureFile:
    """A measure of the package as its source file describes it.

    Args:
        name: Of the measure: the file's name.
        function: Name of the public function.
        command: Of `vit-probe`.
        takes_images: Whether it goes over images; else it looks at the model's weights alone.
        help: Docstring of the function, up to its first section.
        options: Options of the measure.
        plot_options: Options of its picture.
    """

    name: str
    function: str
    command: str
    takes_images: bool
    help: str
    options: tuple[Option, ...]
    plot_options: tuple[Option, ...]


@cache
def measure_files() -> dict[str, MeasureFile]:
    """The measures of the package by name, in the order of their names."""
    found = (_measure_of(path) for path in sorted(_FOLDER.glob("[!_]*.py")))
    return {one.name: one for one in found if one is not None}


@cache
def exports() -> dict[str, str]:
    """The module below `vit_probe.measures` that each public name comes from."""
    names: dict[str, str] = {}
    for path in sorted(_FOLDER.glob("[!_]*.py")):
        for node in _parsed(path).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
                names |= dict.fromkeys(ast.literal_eval(node.value), path.stem)
    return names


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _measure_of(path: Path) -> MeasureFile | None:
    tree = _parsed(path)
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for decorator in node.decorator_list:
            call = decorator.func if isinstance(decorator, ast.Call) else decorator
            name = getattr(call, "id", None) or getattr(call, "attr", "")  # @head_measure, @vit_probe.head_measure
            if name in _DECORATORS:
                return _described(path, tree, node, decorator, name)
    return None


def _described(path: Path, tree: ast.Module, node: ast.FunctionDef, decorator: ast.expr, kind: str) -> MeasureFile:
    given = {keyword.arg: keyword.value for keyword in decorator.keywords} if isinstance(decorator, ast.Call) else {}
    command = ast.literal_eval(given["command"]) if "command" in given else path.stem.replace("_", "-")
    base, base_class = _DECORATORS[kind]
    result_class = getattr(given.get("result"), "id", None) or base_class
    plots = _plot_of(tree, result_class) or (_plot_of(_parsed(_FOLDER / base), base_class) if base else None)
    doc = ast.get_docstring(node) or ""
    options = [*_options(node, tree), *SHARED_OPTIONS[kind]]
    return MeasureFile(
        name=path.stem,
        function=node.name,
        command=command,
        takes_images=kind != "model_measure",
        help=_SECTION.split(doc)[0],
        options=tuple(options),
        plot_options=tuple(one for one in _options(plots, tree) if one.name != "ax") if plots else (),
    )


def _plot_of(tree: ast.Module, result_class: str | None) -> ast.FunctionDef | None:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == result_class:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "plot":
                    return method
    return None


def _options(node: ast.FunctionDef, tree: ast.Module) -> Iterator[Option]:
    """The keyword-only arguments whose type can be written on a command line."""
    described = _argument_help(ast.get_docstring(node) or "")
    aliases = {
        statement.targets[0].id: statement.value
        for statement in tree.body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        if argument.arg in ("batch_size", "device"):  # of the run, which all commands have
            continue
        annotation = argument.annotation
        if isinstance(annotation, ast.Name) and annotation.id in aliases:
            annotation = aliases[annotation.id]
        try:
            kind = eval(compile(ast.Expression(annotation), "", "eval"), {"__builtins__": {}}, _NAMES)  # type: ignore[arg-type]
            value = ast.literal_eval(default) if default is not None else None
        except (NameError, TypeError, ValueError):
            continue  # a type of Python alone, such as axes
        yield Option(argument.arg, kind, value, described.get(argument.arg, ""))


def _argument_help(doc: str) -> dict[str, str]:
    """What the section `Args:` says of each argument, on one line."""
    section = doc.partition("\nArgs:\n")[2].partition("\n\n")[0]
    texts: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line.startswith("    ") and not line.startswith("     ") and ":" in line:
            name, _, text = line.strip().partition(": ")
            texts[name] = text
        elif name:
            texts[name] += f" {line.strip()}"
    return texts
