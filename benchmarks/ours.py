"""The work done by vit_probe, on our own model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.models import Setting
from benchmarks.runs import Numbers, Prepare, Run, as_array
from vit_probe import attention_entropy, attention_hooks, mean_attention_distance
from vit_probe.attention.intercept import ForwardStopped
from vit_probe.measures.rollout import AttentionRollout

__all__ = ["call", "observed", "reference"]


def reference(setting: Setting, batches: Sequence[Tensor], *, rollout: bool) -> Numbers:
    """All numbers, computed by vit_probe, to compare with."""
    grid = setting.grid
    rescaled, dropped = mean_attention_distance.observer(grid), mean_attention_distance.observer(grid, prefix="drop")
    entropy = attention_entropy.observer(grid)
    rollouts = [AttentionRollout(grid)] if rollout else []
    output = _watch(setting, batches, rescaled, dropped, entropy, *rollouts, stop=False)
    numbers = {"distance": rescaled.compute().distance, "distance-dropped": dropped.compute().distance, "output": output}
    numbers["entropy"] = entropy.compute().entropy
    for measure in rollouts:
        numbers["rollout"] = measure.compute().maps
    return numbers


def observed(*names: Literal["distance", "rollout", "entropy"], stop: bool = True) -> Prepare:
    """The measures called `names`, in one pass over the images, which ends after the last layer's attention if `stop`."""

    def prepare(setting: Setting) -> Run:
        setting.load("own")

        def run(batches: Sequence[Tensor]) -> Numbers:
            distance, rollout = mean_attention_distance.observer(setting.grid), AttentionRollout(setting.grid)
            entropy = attention_entropy.observer(setting.grid)
            measures = {"distance": distance, "rollout": rollout, "entropy": entropy}
            output = _watch(setting, batches, *(measures[name] for name in names), stop=stop)
            numbers: Numbers = {} if stop else {"output": output}
            if "distance" in names:
                numbers["distance"] = distance.compute().distance
            if "rollout" in names:
                numbers["rollout"] = rollout.compute().maps
            if "entropy" in names:
                numbers["entropy"] = entropy.compute().entropy
            return numbers

        return run

    return prepare


def call(setting: Setting) -> Run:
    """`mean_attention_distance` as a user calls it."""
    setting.load("own")

    def run(batches: Sequence[Tensor]) -> Numbers:
        return {"distance": mean_attention_distance(setting.own, batches, device=str(setting.device)).distance}

    return run


def _watch(setting: Setting, batches: Sequence[Tensor], *measures: Any, stop: bool) -> np.ndarray:
    """Pass the images through our model under the measures' hooks; the output is empty if the pass is stopped early."""
    model, outputs = setting.own, []
    with torch.no_grad(), attention_hooks(model, *measures) as hooks:
        if stop:
            hooks.stop_after = setting.case.depth - 1
        for batch in batches:
            with suppress(ForwardStopped):
                outputs.append(model(batch))
    return as_array(torch.cat(outputs)) if outputs else np.empty(0)
