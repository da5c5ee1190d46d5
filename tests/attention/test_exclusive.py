"""Two threads: one model is refused to the second, and two models do not disturb each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from tests.example_models import FAMILIES, Assemble, images, small_vit
from vit_probe import InputError, attention_hooks, mean_attention_distance
from vit_probe.attention.intercept import evaluation_mode


def in_another_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(timeout=60)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("part", [False, True])
def test_a_model_that_is_being_measured_is_refused_to_another_thread(training: bool, part: bool) -> None:
    model = small_vit().train(training)
    other = nn.Sequential(model.blocks, nn.Identity()) if part else model  # shares modules, and so hooks and modes
    for context in (evaluation_mode(model), attention_hooks(model)):
        with context, pytest.raises(InputError, match=f"{type(other).__name__} is being measured in another thread; wait"):
            in_another_thread(lambda: mean_attention_distance(other, images(), device="cpu"))
    assert [module.training for module in model.modules()] == [training] * len(list(model.modules()))
    assert len(in_another_thread(lambda: mean_attention_distance(model, images(), device="cpu")).modules) == 2


def test_a_race_leaves_the_mode_as_it_was() -> None:
    model, start = small_vit().train(), threading.Barrier(4)

    def measure() -> None:
        start.wait()
        mean_attention_distance(model, images(), device="cpu")

    with ThreadPoolExecutor(4) as pool:
        errors = [one.exception() for one in [pool.submit(measure) for _ in range(4)]]
    assert None in errors
    assert all(error is None or (isinstance(error, InputError) and "another thread" in str(error)) for error in errors)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_one_thread_may_enter_twice() -> None:
    model = small_vit()
    with evaluation_mode(model), attention_hooks(model, outer := Assemble()), attention_hooks(model, inner := Assemble()):
        model(images())
    assert [len(one.tiles) for one in (outer, inner)] == [2, 2]


def test_the_fast_path_stays_off_until_the_last_thread_is_done() -> None:
    """Without that, the second of two models that are measured at a time would lose its attention to the fast path."""
    model, x = FAMILIES["encoder"].model(), images(32, 48)
    assert torch.backends.mha.get_fastpath_enabled()
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with attention_hooks(small_vit()):
            entered.set()
            leave.wait(60)

    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(hold)
        entered.wait(60)
        with torch.no_grad(), attention_hooks(model) as hooks:
            leave.set()
            holding.result(60)
            model(x)
    assert len(hooks.layers) == 2
    assert torch.backends.mha.get_fastpath_enabled()
