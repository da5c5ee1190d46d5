"""What is read from the source of measures agrees with what importing them gives."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

import vit_probe
from vit_probe.measures.base import discovery
from vit_probe.measures.base.discovery import MeasureFile, exports, measure_files
from vit_probe.measures.base.registry import registered

pytestmark = pytest.mark.usefixtures("own_registry")

FILES = measure_files()
RUN = {"grid", "preprocessing", "batch_size", "device"}


def test_exactly_the_files_with_a_registered_function() -> None:
    found = {}
    for name, spec in registered().items():
        found[name] = spec.function.__module__
        assert sys.modules[spec.function.__module__].__dict__[spec.function.__name__] is spec.function
    assert {name: f"vit_probe.measures.{name}" for name in FILES} == found
    assert list(FILES) == sorted(FILES)


def test_commands_are_unique_and_the_old_ones_stay() -> None:
    commands = {one.command: one.name for one in FILES.values()}
    assert len(commands) == len(FILES)
    kept = {
        "distance": "attention_distance",
        "entropy": "attention_entropy",
        "filters": "patch_filters",
        "positions": "position_similarity",
        "rollout": "rollout",
    }
    assert kept.items() <= commands.items()
    for command, name in commands.items():
        assert command in kept or command == name.replace("_", "-")


@pytest.mark.parametrize("one", FILES.values(), ids=FILES)
def test_function_and_help_are_the_imported_ones(one: MeasureFile) -> None:
    spec = registered()[one.name]
    assert one.function == spec.function.__name__
    assert one.takes_images is (spec.start is not None)
    whole = inspect.getdoc(spec.function) or ""
    assert one.help
    assert whole.startswith(one.help)
    assert not any(heading in one.help for heading in ("Args:", "Returns:", "Raises:", "References:", "Examples:"))


def written_on_a_command_line(parameter: inspect.Parameter) -> bool:
    """Whether the annotation, as it is in the source, is of plain types only."""
    return not any(word in str(parameter.annotation) for word in ("Axes", "TokenGrid", "Preprocessing", "Module"))


def expected_options(function: Any, *without: str) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {
        one.name: one.default
        for one in parameters
        if one.kind is one.KEYWORD_ONLY and one.name not in without and written_on_a_command_line(one)
    }


@pytest.mark.parametrize("one", FILES.values(), ids=FILES)
def test_options_are_those_of_the_function(one: MeasureFile) -> None:
    spec = registered()[one.name]
    assert {option.name: option.default for option in one.options} == expected_options(spec.function, *RUN)
    for option in one.options:
        assert spec.options[option.name] == option.default
        assert option.help
        assert option.help in " ".join((inspect.getdoc(spec.function) or "").split())
        allowed(option.type, option.default)


@pytest.mark.parametrize("one", FILES.values(), ids=FILES)
def test_plot_options_are_those_of_the_results_plot(one: MeasureFile) -> None:
    plot = registered()[one.name].result.plot
    assert {option.name: option.default for option in one.plot_options} == expected_options(plot, "ax")
    for option in one.plot_options:
        assert option.help
        allowed(option.type, option.default)


def allowed(kind: Any, default: Any) -> None:
    """The default is of the type."""
    choices = get_args(kind) if get_origin(kind) is Literal else None
    if choices is not None:
        assert default in choices
    else:
        kinds = tuple(get_origin(one) or one for one in get_args(kind)) if get_args(kind) else (kind,)
        assert isinstance(default, kinds)


def test_every_public_name_is_there() -> None:
    for name, module in exports().items():
        value = getattr(vit_probe.measures, name)
        assert getattr(sys.modules[f"vit_probe.measures.{module}"], name) is value
    assert dir(vit_probe.measures) == sorted(exports())
    for one in FILES.values():
        function = registered()[one.name].function
        assert getattr(vit_probe, one.function) is getattr(vit_probe.measures, one.function) is function
    with pytest.raises(AttributeError, match="has no attribute 'AttentionDistance'"):
        _ = vit_probe.measures.AttentionDistance


def test_reading_imports_nothing_large() -> None:
    program = """
import sys
from vit_probe.measures.base.discovery import exports, measure_files
files = measure_files()
exports()
print(len(files), *(name for name in ("torch", "numpy", "pandas", "matplotlib", "sklearn") if name in sys.modules))
print(*(name for name in sys.modules if name.startswith("vit_probe.measures.") and ".base" not in name))
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown == f"{len(FILES)}\n\n"


def test_importing_the_package_imports_nothing_large() -> None:
    program = "import sys, vit_probe; vit_probe.measures; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown == "False False\n"


# A file that is not there


SOURCE = '''"""A module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from vit_probe.measures.base.head_measure import head_measure
from vit_probe.measures.base.per_head import HeadResult

__all__ = ["OwnResult", "looks"]

Side = Literal["left", "right"]


class OwnResult(HeadResult):
    def plot(self, *, ax: Axes | None = None, kind: Side = "right", spread: bool = False) -> Axes:
        """Draw it.

        Args:
            ax: Where.
            kind: Which side,
                or the other.
        """


def helper(value: int) -> int:
    """No measure."""
    return value


@head_measure(unit="share", reference="a test", result=OwnResult{command})
def looks(
    attention: PatchAttention,
    *,
    side: Side = "left",
    most: int | None = 3,
    factor: float = 0.5,
    layers: Sequence[int] | None = None,
    name: str = "x",
    model: nn.Module | None = None,
) -> dict[str, Tensor]:
    """What a head looks at.

    More of it.

    Args:
        side: One: the left
            or the right.
        most: How many.

    Raises:
        InputError: Never.
    """
    return {{}}
'''


@pytest.fixture
def read_file(tmp_path: Path) -> Iterator[Any]:
    def read(text: str, name: str = "what_heads_see") -> MeasureFile | None:
        path = tmp_path / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        discovery._parsed.cache_clear()
        return discovery._measure_of(path)

    yield read
    discovery._parsed.cache_clear()


def test_a_file_that_declares_a_measure(read_file: Any) -> None:
    one = read_file(SOURCE.format(command=""))
    assert (one.name, one.function, one.command, one.takes_images) == ("what_heads_see", "looks", "what-heads-see", True)
    assert one.help == "What a head looks at.\n\nMore of it."
    side = Literal["left", "right"]
    assert [(option.name, option.type, option.default, option.help) for option in one.options] == [
        ("side", side, "left", "One: the left or the right."),
        ("most", int | None, 3, "How many."),
        ("factor", float, 0.5, ""),
        ("layers", list[int] | None, None, ""),
        ("name", str, "x", ""),
        ("per_image", bool, False, discovery.SHARED_OPTIONS["head_measure"][0].help),
    ]
    assert [(option.name, option.type, option.default, option.help) for option in one.plot_options] == [
        ("kind", side, "right", "Which side, or the other."),
        ("spread", bool, False, ""),
    ]
    assert read_file(SOURCE.format(command=', command="see"')).command == "see"


def test_a_file_that_declares_none(read_file: Any) -> None:
    assert read_file(SOURCE.replace("@head_measure", "@other").format(command="")) is None
    assert read_file('"""Nothing."""\n') is None


def test_the_plot_of_a_general_result(read_file: Any) -> None:
    """A measure without a result class of its own has the options of the base class's plot."""
    one = read_file(SOURCE.replace(", result=OwnResult", "").format(command=""))
    assert [option.name for option in one.plot_options] == ["kind", "layers", "spread"]
