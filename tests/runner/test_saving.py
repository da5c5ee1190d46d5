"""When the progress of a run is saved, and that signals wait for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from vit_probe import InputError
from vit_probe.runner import saving
from vit_probe.runner.saving import HeldSignals, PeriodicSave


class Received(BaseException):
    pass


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request: pytest.FixtureRequest) -> Iterator[int]:
    """A signal whose handler raises `Received`."""

    def receive(*_: object) -> None:
        raise Received

    earlier = signal.signal(request.param, receive)
    yield request.param
    assert signal.getsignal(request.param) is receive  # nothing else was left behind
    signal.signal(request.param, earlier)


def saved_batches(batches: int, *, every: int, every_seconds: float = 30.0) -> list[int]:
    """After which batches the progress was saved."""
    saved: list[int] = []
    done = 0
    with PeriodicSave(lambda: saved.append(done), every=every, every_seconds=every_seconds) as progress:
        for _ in range(batches):
            with progress.batch():
                done += 1
    return saved


@pytest.mark.parametrize(("batches", "every", "saved"), [(7, 3, [3, 6, 7]), (6, 3, [3, 6]), (2, 20, [2]), (0, 20, [0])])
def test_saved_every_few_batches_and_once_at_the_end(batches: int, every: int, saved: list[int]) -> None:
    assert saved_batches(batches, every=every) == saved


def test_saved_after_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))  # ten seconds pass between two looks at it
    monkeypatch.setattr(saving.time, "monotonic", lambda: next(clock))
    assert saved_batches(7, every=100, every_seconds=30) == [3, 6, 7]


def test_a_signal_takes_effect_after_the_batch_once_it_is_saved(number: int) -> None:
    events: list[str] = []

    def go() -> None:
        with PeriodicSave(lambda: events.append("saved"), every=20, every_seconds=30) as progress:
            for batch in range(3):
                with progress.batch():
                    events.append(f"begin {batch}")
                    if batch == 1:
                        signal.raise_signal(number)
                    events.append(f"end {batch}")

    with pytest.raises(Received):
        go()
    assert events == ["begin 0", "end 0", "begin 1", "end 1", "saved"]


def test_a_second_signal_does_not_wait(number: int) -> None:
    saved: list[None] = []

    def go() -> None:
        with PeriodicSave(lambda: saved.append(None), every=20, every_seconds=30) as progress:
            with progress.batch():
                pass
            with progress.batch():
                signal.raise_signal(number)
                signal.raise_signal(number)
                pytest.fail("the second signal waited")

    with pytest.raises(Received):
        go()
    assert saved == []  # the sums of half a batch are of no use


def test_without_saving_nothing_waits(number: int) -> None:
    def go() -> None:
        with PeriodicSave(None, every=1, every_seconds=0) as progress, progress.batch():
            signal.raise_signal(number)
            pytest.fail("the signal waited")

    with pytest.raises(Received):
        go()


def test_a_handler_that_returns_is_called_and_the_run_goes_on(number: int) -> None:
    earlier = signal.getsignal(number)
    called: list[int] = []
    signal.signal(number, lambda number, frame: called.append(number))
    with HeldSignals() as held:
        for _ in range(2):
            signal.raise_signal(number)
            assert held.waiting
            held.deliver()
            assert not held.waiting
    assert called == [number, number]
    signal.signal(number, earlier)


def test_ignored_signals_and_other_threads(number: int) -> None:
    earlier = signal.signal(number, signal.SIG_IGN)
    with HeldSignals() as held:
        signal.raise_signal(number)
        assert not held.waiting
    signal.signal(number, earlier)
    counts: list[int] = []
    thread = threading.Thread(target=lambda: counts.extend(saved_batches(3, every=2)))
    thread.start()
    thread.join()
    assert counts == [2, 3]


@pytest.mark.parametrize(("where", "saved"), [("between batches", [1]), ("within a batch", [])])
def test_an_error_between_batches_costs_nothing(where: str, saved: list[int]) -> None:
    written: list[int] = []

    def save() -> None:
        written.append(1)
        raise InputError("the disk is full")  # is not reported in place of the error

    def go() -> None:
        with PeriodicSave(save, every=20, every_seconds=30) as progress:
            with progress.batch():
                pass
            if where == "between batches":
                raise KeyError
            with progress.batch():
                raise KeyError

    with pytest.raises(KeyError):
        go()
    assert written == saved
