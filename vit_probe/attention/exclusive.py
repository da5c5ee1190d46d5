"""One thread at a time: a model that is being measured, and the settings of the whole process that measuring changes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vit_probe.errors import InputError

__all__ = ["exclusive_use", "interceptable_kernels"]

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_guard = threading.Lock()


@contextmanager
def exclusive_use(model: nn.Module) -> Iterator[None]:
    """Keep other threads from measuring `model`, or a model that shares modules with it; the same thread may enter again.

    Hooks, the training mode and the device belong to a model, not to a thread: two threads that change them leave the model
    in the wrong state, and see each other's images.

    Raises:
        InputError: If another thread is measuring it.

    Examples:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> def enter():
        ...     with exclusive_use(model):
        ...         return "entered"
        >>> model = nn.Linear(2, 2)
        >>> with exclusive_use(model), ThreadPoolExecutor() as other_thread:
        ...     print(enter(), type(other_thread.submit(enter).exception()).__name__)
        entered InputError
    """
    with ExitStack() as held:
        for module in model.modules():
            with _guard:
                lock = _locks.setdefault(module, threading.RLock())
            if not lock.acquire(blocking=False):
                raise InputError(
                    f"{type(model).__name__} is being measured in another thread; wait for that to end, or measure a copy of "
                    "the model (copy.deepcopy)"
                )
            held.callback(lock.release)
        yield


_settings = ExitStack()
_users = 0
_is_uncompiled = False


@contextmanager
def interceptable_kernels() -> Iterator[None]:
    """Switch off what hides attention, in all threads: the fast path of `nn.MultiheadAttention`, and compiled graphs."""
    global _users, _is_uncompiled
    try:
        with _guard:
            _users += 1
            if _users == 1:
                # The fast path is a single kernel that never calls scaled_dot_product_attention.
                _settings.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
                torch.backends.mha.set_fastpath_enabled(False)
            # set_stance imports the compiler, which takes seconds; if it was not imported before, nothing is compiled.
            if not _is_uncompiled and "torch._dynamo" in sys.modules:
                _settings.enter_context(torch.compiler.set_stance("force_eager"))
                _is_uncompiled = True
        yield
    finally:
        with _guard:
            _users -= 1
            if not _users:  # the last one restores what the first one found
                _settings.close()
                _is_uncompiled = False
