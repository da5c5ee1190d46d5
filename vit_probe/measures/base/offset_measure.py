"""`offset_measure`: a measure that is an expectation over offsets, declared by one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor

from vit_probe.errors import InputError
from vit_probe.measures.base.discovery import PREFIXES, SHARED_OPTIONS
from vit_probe.measures.base.option_types import keywords_only
from vit_probe.measures.base.per_head import HeadResult, PerHead
from vit_probe.measures.base.reduce import OffsetMeans, QueryMeans
from vit_probe.measures.base.registry import MeasureFunction, keyword_defaults, name_of, register
from vit_probe.runner.run import AttentionRun
from vit_probe.tokens.grid import OffsetFunction, OffsetTable, TokenGrid, Windows

__all__ = ["OffsetMeasure", "offset_measure"]


@keywords_only
def offset_measure(
    *,
    unit: str,
    reference: str,
    offsets: Literal["pixels", "patches"] = "pixels",
    name: str | None = None,
    value: str | None = None,
    label: str | None = None,
    command: str | None = None,
    result: type[HeadResult] = HeadResult,
) -> Callable[[Callable[..., Tensor]], MeasureFunction[HeadResult]]:
    """Make a measure of an expectation over offsets, sum_j a_ij f(dx, dy).

    The decorated function is f: from the offsets `dx` and `dy` from a query patch to a key patch (float64 tensors) to a number
    for each of them; keyword-only arguments are options of the measure. All else follows: the attention-weighted mean over
    patches for every layer and head, averaged over patch queries and images, with standard deviation and confidence interval;
    what becomes of attention on prefix tokens (`prefix=`); windows; the value of uniform attention; table, plot, resuming,
    several processes. `NAME.observer(grid)` is the streaming measure, an observer for `attention_hooks`.

    Args:
        unit: Of the values.
        reference: Where the measure is from.
        offsets: Whether f takes offsets in pixels of the model's input or in patches.
        name: Of the measure; the function's name if None.
        value: Name of the value in tables; the measure's if None.
        label: What figures call the value; the measure's name in words if None.
        command: Name of the command of a measure in `vit_probe/measures`; the file's name with hyphens if None.
        result: Class of the result.

    Examples:
        >>> import torch
        >>> @offset_measure(unit="pixels", reference="arXiv:2010.11929")
        ... def horizontal_distance(dx, dy):
        ...     '''Attention-weighted horizontal distance from each query patch to all patches.'''
        ...     return dx.abs()
        >>> from vit_probe import load_model
        >>> horizontal_distance(load_model("demo"), torch.zeros(1, 3, 64, 64)).horizontal_distance.shape
        (9, 6)
    """

    if offsets not in ("pixels", "patches"):
        raise InputError(f"offsets must be one of pixels, patches; got {offsets!r}")

    def decorate(function: Callable[..., Tensor]) -> MeasureFunction[HeadResult]:
        own = name_of(function) if name is None else name
        defaults = keyword_defaults(function)

        def observer(
            grid: TokenGrid,
            *,
            windows: Mapping[int, Windows] | None = None,
            prefix: str = "renormalize",
            per_image: bool = False,
            **options: Any,
        ) -> OffsetMeasure:
            return OffsetMeasure(
                own,
                partial(function, **(defaults | options)) if defaults else function,
                grid,
                unit=unit,
                value=value or own,
                label=label,
                in_patches=offsets == "patches",
                prefix=prefix,
                windows=windows,
                options=defaults | options,
                per_image=per_image,
                result=result,
            )

        def start(run: AttentionRun, **options: Any) -> OffsetMeasure:
            return observer(run.grid, windows=run.windows, **options)

        public = register(function, result, start, name=own, shared=SHARED_OPTIONS["offset_measure"], observer=observer)
        public.reference = reference
        return public

    return decorate


class OffsetMeasure(PerHead):
    """The streaming measure that `offset_measure` declares.

    Args:
        name: Of the measure.
        function: Of the offsets dx and dy.
        grid: Where the patches lie.
        unit: Of the values.
        value: Name of the value.
        label: What figures call it.
        in_patches: Whether the function takes offsets in patches.
        prefix: `renormalize` or `drop`.
        windows: The layers whose attention is not over all the tokens of `grid`.
        options: Of the function.
        per_image: Whether to keep the value of every image.
        result: Class of the result.

    Raises:
        InputError: If `prefix` is unknown, or the function does not return one finite number per offset.
    """

    def __init__(
        self,
        name: str,
        function: OffsetFunction,
        grid: TokenGrid,
        *,
        unit: str,
        value: str,
        label: str | None = None,
        in_patches: bool = False,
        prefix: str = "renormalize",
        windows: Mapping[int, Windows] | None = None,
        options: Mapping[str, Any] | None = None,
        per_image: bool = False,
        result: type[HeadResult] = HeadResult,
    ) -> None:
        if prefix not in get_args(PREFIXES):
            raise InputError(f"prefix must be one of {', '.join(get_args(PREFIXES))}; got {prefix!r}")
        self.name, self.unit, self.label, self.result = name, unit, label or name.replace("_", " ").capitalize(), result
        self._function, self._value, self._in_patches = function, value, in_patches
        self._prefix = prefix
        OffsetTable(grid, function, in_patches=in_patches)  # tells at once what is wrong with the function
        super().__init__(grid, windows, dict(options or {}) | {"prefix": prefix}, per_image=per_image)

    def _head_means(self) -> QueryMeans:
        renormalize = self._prefix == "renormalize"
        values = OffsetMeans(self._value, self._function, in_patches=self._in_patches, renormalize=renormalize)
        return QueryMeans(self.grid, self.windows, values)

    def _uniform(self, layer: int) -> dict[str, float]:
        windows = self.windows.get(layer)
        table = OffsetTable(windows.grid if windows else self.grid, self._function, in_patches=self._in_patches)
        return {self._value: windows.uniform(table) if windows else table.uniform()}
