"""The registry of measures: what a decorated function becomes, and running several in one pass.

Every decorator of `vit_probe.measures.base` ends in `register`, which turns the function of a measure's author into the public
function and enters it in the registry. The commands, `measure`, `overview`, `load_result` and the tests go by the registry, so
that a measure is complete without being named anywhere else.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

from torch import nn

from vit_probe.data.preprocessing import Preprocessing
from vit_probe.data.stream import Images
from vit_probe.errors import InputError
from vit_probe.measures.base.discovery import Option, measure_files
from vit_probe.measures.base.option_types import check_options, checking_options, keywords_only, option_types
from vit_probe.results import Result
from vit_probe.runner.arguments import check_model_and_images
from vit_probe.runner.protocol import Measure
from vit_probe.runner.run import AttentionRun
from vit_probe.tokens.grid import TokenGrid

__all__ = [
    "SHOWN_IMAGES",
    "MeasureFunction",
    "MeasureSpec",
    "keyword_defaults",
    "measure",
    "model_measure",
    "name_of",
    "register",
    "registered",
    "result_class",
    "spec_of",
    "streaming_measure",
]

SHOWN_IMAGES = 64
"""Photographs that a result keeps beside its maps."""

P = ParamSpec("P")
R = TypeVar("R", bound=Result, covariant=True)


class MeasureFunction(Protocol, Generic[R]):
    """The public function of a measure."""

    __name__: str
    spec: MeasureSpec
    reference: str
    observer: Callable[..., Any]

    def __call__(
        self,
        model: nn.Module,
        images: Images,
        *,
        grid: TokenGrid | None = None,
        preprocessing: Preprocessing | None = None,
        batch_size: int = 16,
        device: str = "auto",
        **options: Any,
    ) -> R: ...


@dataclass(frozen=True)
class MeasureSpec:
    """What the package knows of a measure.

    Args:
        name: Of the measure, of its result in tables and of its files.
        function: The public function.
        result: Class of its result.
        start: Makes the streaming measure for a run, given the options; None for a measure of the model's weights alone.
        options: The names of its options, with their defaults.
        shows_images: Whether its result keeps photographs for its picture.
    """

    name: str
    function: Callable[..., Result]
    result: type[Result]
    start: Callable[..., Measure] | None
    options: Mapping[str, Any]
    shows_images: bool = False


_SPECS: dict[str, MeasureSpec] = {}

_BEFORE = """\
model: Any Vision Transformer whose attention goes through `scaled_dot_product_attention`.
images: Photographs, paths, a preprocessed tensor (batch, channel, height, width), or an iterable of such batches."""
_AFTER = """\
grid: Where the patches lie; determined from the model if None.
preprocessing: How photographs are prepared; the model's own if None.
batch_size: Images per forward pass.
device: Where to run: `auto`, `cpu`, `cuda`, `mps`."""
_DOC_WIDTH = 116
_RUN = {"grid": None, "preprocessing": None, "batch_size": 16, "device": "auto"}


def register(
    author: Callable[..., Any],
    result: type[Result],
    start: Callable[..., Measure],
    *,
    name: str | None = None,
    shared: Sequence[Option] = (),
    shows_images: bool = False,
    observer: Callable[..., Measure] | None = None,
) -> MeasureFunction[Any]:
    """Make the public function of a measure, and enter it in the registry.

    Args:
        author: What the measure's author wrote: its keyword-only arguments are options, its docstring says what it measures.
        result: Class of the result.
        start: Makes the streaming measure from an `AttentionRun` and the options.
        name: Of the measure; the function's name if None.
        shared: Options of the decorator, behind the author's own.
        shows_images: Whether the result keeps photographs for its picture.
        observer: Makes the streaming measure without a run, for `attention_hooks`, given the options.
    """
    signature = _checked_signature(author, shared)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is parameter.KEYWORD_ONLY]
    given = [inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="nn.Module")]
    given += [inspect.Parameter("images", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="Images")]
    keyword = inspect.Parameter.KEYWORD_ONLY
    own += [inspect.Parameter(one.name, keyword, default=one.default, annotation=one.type) for one in shared]
    common = [inspect.Parameter(option, keyword, default=default) for option, default in _RUN.items()]
    public = inspect.Signature([*given, *own, *common], return_annotation=result)
    types = option_types(author) | {one.name: one.type for one in shared}

    def function(*args: Any, **kwargs: Any) -> Any:
        bound = public.bind(*args, **kwargs)
        bound.apply_defaults()
        options = {parameter.name: bound.arguments[parameter.name] for parameter in own}
        run_options = {option: bound.arguments[option] for option in _RUN}
        model, images = bound.arguments["model"], bound.arguments["images"]
        return measure(model, images, [partial(function, **options)], **run_options)[0]

    function.__name__ = function.__qualname__ = author.__name__
    function.__module__ = author.__module__
    function.__doc__ = _documented(author.__doc__ or "", shared)
    function.__signature__ = public  # type: ignore[attr-defined]
    options = {parameter.name: parameter.default for parameter in own}
    start = checking_options(start, types)
    public_function = _enter(MeasureSpec(name or author.__name__, function, result, start, options, shows_images))
    if observer is not None:
        public_function.observer = checking_options(observer, types)
    return public_function


@keywords_only
def streaming_measure(
    *,
    result: type[R],
    name: str | None = None,
    command: str | None = None,
    shows_images: bool = False,
    start: Callable[..., Measure] | None = None,
) -> Callable[[Callable[..., Any]], MeasureFunction[R]]:
    """Make a measure of a class that keeps sums of its own, a `vit_probe.runner.protocol.Measure`.

    The decorated function makes the streaming measure from an `AttentionRun`; its keyword-only arguments are options. A public
    function that does more than one run is given as it is, with `start` to make the streaming measure of a single run.

    Args:
        result: Class of the result.
        name: Of the measure; the function's name if None.
        command: Name of the command of a measure in `vit_probe/measures`; the file's name with hyphens if None.
        shows_images: Whether the result keeps photographs for its picture.
        start: Makes the streaming measure, where the decorated function is the public one already.
    """

    def decorate(function: Callable[..., Any]) -> MeasureFunction[R]:
        if start is None:
            return register(function, result, function, name=name, shows_images=shows_images)
        options = keyword_defaults(start)
        return _enter(MeasureSpec(name or function.__name__, function, result, start, options, shows_images))

    return decorate


@keywords_only
def model_measure(
    *, result: type[Result], name: str | None = None, command: str | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Enter a measure of the model's weights alone in the registry; its public function is the author's, with checked options.

    Args:
        result: Class of the result.
        name: Of the measure; the function's name if None.
        command: Name of the command of a measure in `vit_probe/measures`; the file's name with hyphens if None.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        public = checking_options(function, option_types(function))
        _enter(MeasureSpec(name or function.__name__, public, result, None, keyword_defaults(function)))
        return public

    return decorate


def name_of(author: Callable[..., Any]) -> str:
    """The name of what a measure's author wrote.

    Raises:
        InputError: If it is not a Python function, which alone tells its arguments and their types.
    """
    if not inspect.isfunction(author):
        raise InputError(f"a measure must be a function written with def, got {author!r}; write one that calls it")
    return author.__name__


def keyword_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only arguments of a function with their defaults: the options of a measure."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _checked_signature(author: Callable[..., Any], shared: Sequence[Option]) -> inspect.Signature:
    """Raise InputError unless the author's keyword-only arguments can be options: each with a default and a name of its own."""
    signature = inspect.signature(author)
    taken = {"model", "images", *_RUN, *(one.name for one in shared)}
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise InputError(f"the measure {author.__name__} takes *args or **kwargs; name each option")
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if parameter.default is parameter.empty:
            raise InputError(f"the option {name} of the measure {author.__name__} has no default; give it one")
        if name in taken:
            raise InputError(f"the option {name} of {author.__name__} is one that all measures have; choose another name")
    return signature


def _enter(spec: MeasureSpec) -> MeasureFunction[Any]:
    files = measure_files()
    if spec.name in files and spec.function.__module__ != f"vit_probe.measures.{spec.name}":
        raise InputError(f"vit_probe has a measure {spec.name} already; choose another name for {spec.function.__name__}")
    _SPECS[spec.name] = spec
    spec.function.spec = spec  # type: ignore[attr-defined]
    return spec.function  # type: ignore[return-value]


def _documented(doc: str, shared: Sequence[Option]) -> str:
    """The author's docstring with the arguments that all measures have."""
    text = inspect.cleandoc(doc)
    about, _, rest = text.partition("\n\nArgs:\n")
    own, _, sections = rest.partition("\n\n")
    if not rest:  # no arguments of its own: the sections follow the description
        places = [
            about.index(f"\n\n{name}:") for name in ("Returns", "Raises", "References", "Examples") if f"\n\n{name}:" in about
        ]
        end = min(places, default=len(about))
        about, sections = about[:end], about[end:].lstrip("\n")
    lines = [*_BEFORE.splitlines(), *(line[4:] for line in own.splitlines())]
    for one in shared:
        lines += textwrap.wrap(f"{one.name}: {one.help}", _DOC_WIDTH, subsequent_indent="    ")
    lines += _AFTER.splitlines()
    arguments = "\n".join(f"    {line}" for line in lines)
    return f"{about}\n\nArgs:\n{arguments}\n" + (f"\n{sections}\n" if sections else "")


def registered() -> dict[str, MeasureSpec]:
    """All measures by name: those of the package, and those that were defined by users."""
    for name in measure_files():
        import_module(f"vit_probe.measures.{name}")
    return {name: _SPECS[name] for name in sorted(_SPECS)}


def spec_of(function: Callable[..., Any]) -> tuple[MeasureSpec, dict[str, Any]]:
    """A measure by its public function, or by `functools.partial` of it, with the options given there.

    Raises:
        InputError: If it is neither.
    """
    options: dict[str, Any] = {}
    public: Any = function
    if isinstance(public, partial) and not public.args:
        public, options = public.func, dict(public.keywords)
    spec = getattr(public, "spec", None)
    if not isinstance(spec, MeasureSpec):
        raise InputError(
            "measures are functions such as mean_attention_distance, or functools.partial of one with its options; got "
            f"{function!r}"
        )
    if unknown := sorted(options.keys() - spec.options.keys()):
        raise InputError(f"{public.__name__} has no option {', '.join(unknown)}; it has {', '.join(spec.options) or 'none'}")
    return spec, dict(spec.options) | options


def measure(
    model: nn.Module,
    images: Images,
    measures: Sequence[Callable[..., Any]],
    *,
    per_image: bool = False,
    grid: TokenGrid | None = None,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> list[Any]:
    """Measure several things in one forward pass of each image.

    Args:
        model: Any Vision Transformer whose attention goes through `scaled_dot_product_attention`.
        images: Photographs, paths, a preprocessed tensor (batch, channel, height, width), or an iterable of such batches.
        measures: Public functions of measures, such as `mean_attention_distance`; `functools.partial(attention_rollout,
            head_fusion="max")` gives options.
        per_image: Keep the value of every image, too, in all measures that have such values.
        grid: Where the patches lie; determined from the model if None.
        preprocessing: How photographs are prepared; the model's own if None.
        batch_size: Images per forward pass.
        device: Where to run: `auto`, `cpu`, `cuda`, `mps`.

    Returns:
        The results, in the order of the measures.

    Raises:
        InputError: If a measure or an option is unknown, the images cannot be used, the model lacks what a measure needs, or no
            attention is seen.

    Examples:
        >>> import torch, vit_probe as vp
        >>> model = vp.load_model("demo")
        >>> far, broad = vp.measure(model, torch.zeros(1, 3, 64, 64), [vp.mean_attention_distance, vp.attention_entropy])
        >>> far.distance.shape, broad.entropy.shape
        ((9, 6), (9, 6))
    """
    if callable(measures) or isinstance(measures, str) or not isinstance(measures, Iterable):
        raise InputError(f"measures must be a list, such as [mean_attention_distance, attention_entropy]; got {measures!r}")
    check_options({"per_image": bool}, {"per_image": per_image})
    check_model_and_images(model, images)
    chosen = [spec_of(function) for function in measures]
    for spec, options in chosen:
        if per_image and "per_image" in spec.options:
            options["per_image"] = True
    results: dict[int, Result] = {}
    streaming: dict[int, Measure] = {}
    if any(spec.start for spec, _ in chosen):
        run = AttentionRun(
            model,
            images,
            grid=grid,
            preprocessing=preprocessing,
            batch_size=batch_size,
            device=device,
            keep_images=SHOWN_IMAGES if any(spec.shows_images for spec, _ in chosen) else 0,
        )
        streaming = {index: spec.start(run, **options) for index, (spec, options) in enumerate(chosen) if spec.start}
        run.observe(*streaming.values())
        results |= {index: run.result(one) for index, one in streaming.items()}
    results |= {index: spec.function(model, **options) for index, (spec, options) in enumerate(chosen) if not spec.start}
    return [results[index] for index in range(len(chosen))]


def result_class(name: str) -> type[Result] | None:
    """Class of the results of a measure; None if it is not known.

    Only the module of that measure is imported, and only if it is one of this package.
    """
    if name not in _SPECS and name in measure_files():
        import_module(f"vit_probe.measures.{name}")
    return _SPECS[name].result if name in _SPECS else None
