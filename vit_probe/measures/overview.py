"""Every measure of a model on the same images, and the few numbers that say the most about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
from torch import nn

from vit_probe.data.preprocessing import Preprocessing
from vit_probe.data.stream import Images
from vit_probe.errors import InputError, TokensNotFound
from vit_probe.measures.base.hidden_states import HiddenStateMeasure
from vit_probe.measures.base.registry import SHOWN_IMAGES, registered
from vit_probe.results import Result
from vit_probe.runner.protocol import Measure
from vit_probe.runner.run import AttentionRun

__all__ = ["Overview", "overview"]


@dataclass(frozen=True)
class Overview:
    """The results of every registered measure for one model on the same images.

    Args:
        results: By the name of the measure; those that the model allows.
        left_out: By the name of the measure, why the model does not allow it.
    """

    results: dict[str, Result]
    left_out: dict[str, str]

    def numbers(self) -> pd.DataFrame:
        """One row per number: measure, number, unit, value; see `Result.key_numbers` of each result.

        NaN where there is nothing to take a number of, such as the correlation of two images where there is one.
        """
        rows = [(name, *number) for name, result in self.results.items() for number in result.key_numbers()]
        return pd.DataFrame(rows, columns=["measure", "number", "unit", "value"])

    def panels(self, *names: str) -> dict[str, Callable[..., Any]]:
        """By title, what draws each measure on small axes given as `ax`, for `plot_comparison`.

        Args:
            names: Which measures, in this order; all if none are named. Those that the model does not allow are left out.
        """
        chosen = [self.results[name] for name in names or self.results if name in self.results]
        return {result.panel_title: result.plot_panel for result in chosen}


def overview(
    model: nn.Module,
    images: Images,
    *,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> Overview:
    """Measure everything that can be measured of a model on some images, in one pass.

    Args:
        model: Any Vision Transformer whose attention goes through `scaled_dot_product_attention`. Where its blocks do not show
            their tokens, the images go through it once more, for the measures of attention alone.
        images: Photographs, paths, a preprocessed tensor (batch, channel, height, width), or an iterable of such batches.
        preprocessing: How photographs are prepared; the model's own if None.
        batch_size: Images per forward pass.
        device: Where to run: `auto`, `cpu`, `cuda`, `mps`.

    Raises:
        InputError: If the images cannot be used, no attention is seen, or numbers are not finite; or if the blocks turn out
            not to show their tokens after an iterator has been exhausted.

    Examples:
        >>> import torch
        >>> from vit_probe import load_model, overview
        >>> found = overview(load_model("demo"), torch.rand(4, 3, 64, 64))
        >>> "attention_distance" in found.results
        True
    """
    left_out: dict[str, str] = {}

    def attempt(name: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except InputError as error:
            left_out[name] = str(error)
            return None

    specs = registered()
    run = AttentionRun(
        model, images, preprocessing=preprocessing, batch_size=batch_size, device=device, keep_images=SHOWN_IMAGES
    )

    def observed(*, hidden_states: bool) -> dict[str, Measure]:
        """The streaming measures by name, after a pass over the images."""
        started: dict[str, Measure] = {}
        for name, spec in specs.items():
            one = None if spec.start is None else attempt(name, partial(spec.start, run, **spec.options))
            if one is not None and (hidden_states or not isinstance(one, HiddenStateMeasure)):
                started[name] = one
        run.observe(*started.values())
        return started

    try:
        measures = observed(hidden_states=True)
    except TokensNotFound as error:
        if run.images.names and isinstance(images, Iterator):
            raise  # its images are gone
        measures = observed(hidden_states=False)
        streaming = {name for name, spec in specs.items() if spec.start is not None}
        left_out |= {name: str(error) for name in sorted(streaming - measures.keys() - left_out.keys())}
    results: dict[str, Result | None] = {}
    for name, one in measures.items():
        # Few images may not suffice, as for the similarity of representations; weights that are not finite spoil everything.
        compute = attempt if isinstance(one, HiddenStateMeasure) and one.min_batch_size > 1 else _directly
        results[name] = compute(name, partial(run.result, one))
    for name, spec in specs.items():
        if spec.start is None:
            results[name] = attempt(name, partial(spec.function, model))
    return Overview({name: found for name in specs if (found := results.get(name)) is not None}, left_out)


def _directly(name: str, make: Callable[[], Any]) -> Any:
    return make()
