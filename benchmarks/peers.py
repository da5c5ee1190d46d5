"""The plain forward passes, and the work done with other libraries, from the whole attention map of a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks import formulas
from benchmarks.models import Setting
from benchmarks.operators import define_torchvision_operators
from benchmarks.runs import Numbers, Prepare, Run, as_array

__all__ = ["from_maps", "plain", "timm_extract", "timm_hooks", "transformers_eager"]

Take = Callable[[Tensor], None]
Show = Callable[[Tensor, Take], None]
"""Passes a batch through a model, and calls a function with each layer's attention (batch, head, query, key)."""


def plain(model: Literal["own", "timm_fused", "transformers_sdpa"]) -> Prepare:
    """The forward pass of a model of a `Setting` and nothing else, which is the floor."""

    def prepare(setting: Setting) -> Run:
        forward = setting.load(model)

        @torch.no_grad()
        def run(batches: Sequence[Tensor]) -> Numbers:
            return {"output": as_array(torch.cat([_class_token(forward(batch)) for batch in batches]))}

        return run

    return prepare


def from_maps(source: Callable[[Setting], Show], number: Literal["distance", "distance-dropped", "rollout"]) -> Prepare:
    """A number computed from whole attention maps."""

    def prepare(setting: Setting) -> Run:
        show = source(setting)

        @torch.no_grad()
        def run(batches: Sequence[Tensor]) -> Numbers:
            if number == "rollout":
                return {number: np.concatenate([_rollout(show, batch, setting) for batch in batches])}
            return {number: _distance(show, batches, setting, rescaled=number == "distance")}

        return run

    return prepare


def _distance(show: Show, batches: Sequence[Tensor], setting: Setting, *, rescaled: bool) -> np.ndarray:
    distances = formulas.patch_distances(setting.grid)
    table = torch.from_numpy(distances).to(setting.device)
    total = np.zeros((setting.case.depth, setting.case.num_heads))
    for batch in batches:
        heads: list[np.ndarray] = []

        def add(attention: Tensor, heads: list[np.ndarray] = heads) -> None:
            if rescaled:
                heads.append(as_array(formulas.torch_distance(attention, table)))
            else:
                heads.append(formulas.keras_distance(as_array(attention), distances))

        show(batch, add)
        total += np.stack(heads)
    return total / sum(map(len, batches))


def _rollout(show: Show, batch: Tensor, setting: Setting) -> np.ndarray:
    fused: list[Tensor] = []
    show(batch, lambda attention: fused.append(attention.mean(dim=1, dtype=torch.float32)))
    return as_array(formulas.rollout_maps(fused, setting.grid))


def transformers_eager(setting: Setting) -> Show:
    """Eager attention with `output_attentions=True`, which returns the maps of all layers at the end."""
    model = setting.load("transformers_eager")

    def show(batch: Tensor, take: Take) -> None:
        for attention in model(pixel_values=batch, output_attentions=True).attentions:
            take(attention)

    return show


def timm_hooks(setting: Setting) -> Show:
    """Forward hooks on the dropout of unfused attention, which see one layer's map at a time."""
    model = setting.load("timm_unfused")

    def show(batch: Tensor, take: Take) -> None:
        drops = [block.attn.attn_drop for block in model.blocks]
        handles = [drop.register_forward_hook(lambda module, inputs, output: take(output)) for drop in drops]
        try:
            model(batch)
        finally:
            for handle in handles:
                handle.remove()

    return show


def timm_extract(setting: Setting) -> Show:
    """timm's `AttentionExtract` with its defaults, on a model whose fused attention is switched off.

    With fused attention, it finds no softmax in the graph and raises.
    """
    model = setting.load("timm_unfused")
    define_torchvision_operators()
    from timm.utils.attention_extract import AttentionExtract

    extract = AttentionExtract(model)

    def show(batch: Tensor, take: Take) -> None:
        for attention in extract(batch).values():
            take(attention)

    return show


def _class_token(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.last_hidden_state[:, 0]
