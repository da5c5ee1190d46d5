"""When the progress of a run is saved: every few batches or seconds, and before a signal or an error ends the run."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

from vit_probe.errors import InputError

__all__ = ["HeldSignals", "PeriodicSave"]


class PeriodicSave:
    """Context manager for the batches of a run, between which its progress is saved.

    SIGINT and SIGTERM take effect between batches, once the progress is saved, because the sums of half a batch cannot be
    continued. So does an error between batches, such as an image that cannot be read.

    Args:
        save: Writes the progress; None if the run is not to be resumed, and then signals take effect at once.
        every: Number of batches after which it is called.
        every_seconds: Time after which it is called, at the end of the batch.

    Examples:
        >>> with PeriodicSave(lambda: print("saved"), every=2, every_seconds=30) as progress:
        ...     for number in range(3):
        ...         with progress.batch():
        ...             print(number)
        0
        1
        saved
        2
        saved
    """

    def __init__(self, save: Callable[[], object] | None, *, every: int, every_seconds: float) -> None:
        self._save, self._every, self._every_seconds = save, every, every_seconds
        self._signals = HeldSignals()
        self._batches = 0  # since it was saved
        self._saved = False  # as it is now
        self._within_batch = False

    def __enter__(self) -> Self:
        self._last = time.monotonic()
        if self._save is not None:
            self._signals.__enter__()
        return self

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Context manager for one batch."""
        self._within_batch = True
        yield
        self._within_batch = False
        self._batches, self._saved = self._batches + 1, False
        late = time.monotonic() - self._last >= self._every_seconds
        if self._batches >= self._every or late or self._signals.waiting:
            self._save_now()
        self._signals.deliver()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                if not self._saved:  # drawing may fail afterwards, and would cost the last batches
                    self._save_now()
            elif self._batches and not self._within_batch:
                with suppress(InputError):  # what ended the run is reported, not that the disk is full, too
                    self._save_now()
        finally:
            self._signals.__exit__()

    def _save_now(self) -> None:
        if self._save is not None:
            self._save()
            self._batches, self._saved, self._last = 0, True, time.monotonic()


class HeldSignals:
    """Context manager within which SIGINT (Ctrl-C) and SIGTERM wait until `deliver` is called, or until its end.

    A second signal does not wait. Signals that are ignored stay ignored. Outside the main thread, the only one in which Python
    handles signals, nothing is held back.

    Examples:
        >>> earlier = signal.signal(signal.SIGTERM, lambda *_: print("terminated"))
        >>> with HeldSignals() as held:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     print(held.waiting)
        ...     held.deliver()
        True
        terminated
        >>> _ = signal.signal(signal.SIGTERM, earlier)
    """

    def __init__(self) -> None:
        self._waiting: int | None = None
        self._handlers: dict[int, Any] = {}  # those that were installed before

    @property
    def waiting(self) -> bool:
        """Whether a signal has come and waits."""
        return self._waiting is not None

    def deliver(self) -> None:
        """Hand a waiting signal to the handler that was installed before; without one, do nothing."""
        number, self._waiting = self._waiting, None
        if number is not None:
            self._restore()
            signal.raise_signal(number)
            self._hold()  # the handler may have returned, and another signal may come

    def __enter__(self) -> Self:
        self._hold()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        if self._waiting is not None:
            signal.raise_signal(self._waiting)

    def _hold(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            # None is a handler that was not installed from Python, which could not be put back.
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                self._handlers[number] = signal.signal(number, self._keep)

    def _restore(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _keep(self, number: int, frame: FrameType | None) -> None:
        again, self._waiting = self.waiting, number
        if again:
            self.deliver()
