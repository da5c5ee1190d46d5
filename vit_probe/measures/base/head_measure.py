"""`head_measure`: a measure that is any number per head, declared by one function of attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch

from vit_probe.attention.tiles import AttentionTile
from vit_probe.errors import InputError
from vit_probe.measures.base.discovery import SHARED_OPTIONS
from vit_probe.measures.base.option_types import keywords_only
from vit_probe.measures.base.per_head import HeadResult, PerHead
from vit_probe.measures.base.reduce import PatchAttention, QueryMeans, ReceivedMeans, read_only
from vit_probe.measures.base.registry import MeasureFunction, keyword_defaults, name_of, register
from vit_probe.runner.run import AttentionRun
from vit_probe.tokens.grid import TokenGrid, Windows

__all__ = ["HeadMeasure", "head_measure"]

Values = Mapping[str, Any]

_UNIFORM_ELEMENTS = 1 << 22  # of uniform attention, made at a time


@keywords_only
def head_measure(
    *,
    unit: str,
    reference: str,
    attention: Literal["paid", "received"] = "paid",
    name: str | None = None,
    label: str | None = None,
    command: str | None = None,
    result: type[HeadResult] = HeadResult,
) -> Callable[[Callable[..., Values]], MeasureFunction[HeadResult]]:
    """Make a measure of any numbers per head that follow from its attention.

    The decorated function is given the attention of some patch queries and returns named values for each of them; keyword-only
    arguments are options of the measure. All else follows: means over patch queries and images for every layer and head, with
    standard deviation and confidence interval; windows; the values of uniform attention; table, plot, resuming, several
    processes. The first value is what the measure is about, and is drawn. `NAME.observer(grid)` is the streaming measure, an
    observer for `attention_hooks`.

    Args:
        unit: Of the first value.
        reference: Where the measure is from.
        attention: What the function is given: `paid`, a `PatchAttention`, for values (image, head, query), and for maps
            (image, head, query, ...) or a `QuerySum`; `received`, a `ReceivedAttention`, how much attention each token gets
            from all patch queries of an image, for values (image, head).
        name: Of the measure; the function's name if None.
        label: What figures call the first value; the measure's name in words if None.
        command: Name of the command of a measure in `vit_probe/measures`; the file's name with hyphens if None.
        result: Class of the result.

    Examples:
        >>> @head_measure(unit="share", reference="an example")
        ... def largest_weight(attention: PatchAttention) -> dict[str, torch.Tensor]:
        ...     '''The largest weight that each query gives to a patch.'''
        ...     return {"largest_weight": attention.to_patches.amax(dim=-1)}
        >>> from vit_probe import load_model
        >>> largest_weight(load_model("demo"), torch.zeros(1, 3, 64, 64)).largest_weight.shape
        (9, 6)
    """

    if attention not in ("paid", "received"):
        raise InputError(f"attention must be one of paid, received; got {attention!r}")

    def decorate(function: Callable[..., Values]) -> MeasureFunction[HeadResult]:
        own = name_of(function) if name is None else name
        defaults = keyword_defaults(function)

        def observer(
            grid: TokenGrid, *, windows: Mapping[int, Windows] | None = None, per_image: bool = False, **options: Any
        ) -> HeadMeasure:
            return HeadMeasure(
                own,
                partial(function, **(defaults | options)) if defaults else function,
                grid,
                unit=unit,
                attention=attention,
                label=label,
                windows=windows,
                options=defaults | options,
                per_image=per_image,
                result=result,
            )

        def start(run: AttentionRun, **options: Any) -> HeadMeasure:
            return observer(run.grid, windows=run.windows, **options)

        public = register(function, result, start, name=own, shared=SHARED_OPTIONS["head_measure"], observer=observer)
        public.reference = reference
        return public

    return decorate


class HeadMeasure(PerHead):
    """The streaming measure that `head_measure` declares.

    Args:
        name: Of the measure.
        function: Of the attention of some patch queries, or of the attention that tokens receive.
        grid: Where the patches lie.
        unit: Of the first value.
        attention: `paid` or `received`; see `head_measure`.
        label: What figures call the first value.
        windows: The layers whose attention is not over all the tokens of `grid`.
        options: Of the function.
        per_image: Whether to keep the value of every image.
        result: Class of the result.

    Raises:
        InputError: If attention received is asked for in a model that attends within windows.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Values],
        grid: TokenGrid,
        *,
        unit: str,
        attention: Literal["paid", "received"] = "paid",
        label: str | None = None,
        windows: Mapping[int, Windows] | None = None,
        options: Mapping[str, Any] | None = None,
        per_image: bool = False,
        result: type[HeadResult] = HeadResult,
    ) -> None:
        self.name, self.unit, self.label, self.result = name, unit, label or name.replace("_", " ").capitalize(), result
        self._function, self._attention = function, attention
        if attention == "received" and windows:
            raise InputError(
                f"{name} sums the attention of all queries of an image, but {len(windows)} layers of this model (the first is "
                f"layer {min(windows)}) attend within windows or over merged patches; use mean_attention_distance"
            )
        super().__init__(grid, windows, dict(options or {}), per_image=per_image)

    def per_query(self, attention: PatchAttention, *, disposable: bool) -> Values:
        """The author's values; see `vit_probe.measures.base.reduce.PerQuery`."""
        with read_only(attention.weights, self.name):
            return self._function(attention)

    def _head_means(self) -> QueryMeans | ReceivedMeans:
        if self._attention == "received":
            return ReceivedMeans(self.grid, self._function)
        return QueryMeans(self.grid, self.windows, self)

    def _uniform(self, layer: int) -> dict[str, float]:
        """Feeds uniform attention through the same means as the model's."""
        windows = self.windows.get(layer)
        tokens = windows.patches.shape[1] if windows else self.grid.num_tokens
        images = len(windows.patches) if windows else 1
        means = self._head_means()
        step = max(1, _UNIFORM_ELEMENTS // (tokens * images))
        found: Mapping[str, Any] | None = None
        for start in range(0, tokens, step):
            queries = slice(start, min(start + step, tokens))
            weights = torch.full((images, 1, queries.stop - queries.start, tokens), 1 / tokens, dtype=torch.float64)
            found = means.add(AttentionTile(layer, "", slice(0, images), slice(0, 1), queries, 1, tokens, weights))
        return {name: float(value[0, 0]) for name, value in (found or {}).items() if value.ndim == 2}
