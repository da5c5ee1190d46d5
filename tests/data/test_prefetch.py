"""Preparing results in threads: in order, bounded, and without leaving a thread behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterable, Iterator

import pytest

from vit_probe.data.prefetch import parallel_map, prefetch


def thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("vit_probe")]


def collect(results: Iterable[int], into: list[int]) -> None:
    """Append `results` one by one, so that those before an exception are kept."""
    for result in results:
        into.append(result)


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    yield
    assert thread_names() == []


def test_results_keep_the_order_of_the_items() -> None:
    def slow_at_first(item: int) -> int:
        time.sleep(0.02 / (1 + item))
        return item * item

    assert list(parallel_map(slow_at_first, range(20), workers=4)) == [item * item for item in range(20)]


def test_items_are_processed_in_parallel_at_most_twice_the_workers_ahead() -> None:
    barrier = threading.Barrier(2)
    assert list(parallel_map(lambda item: barrier.wait(timeout=5) >= 0, range(4), workers=2)) == [True] * 4
    taken: list[int] = []
    results = parallel_map(lambda item: item, (taken.append(item) or item for item in range(100)), workers=2)
    assert taken == []
    for consumed in range(1, 5):
        next(results)
        assert len(taken) == consumed + 3
    results.close()


@pytest.mark.parametrize("where", ["function", "items"])
def test_an_exception_is_raised_after_the_results_before_it(where: str) -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        if where == "items":
            raise RuntimeError("broken")
        yield from range(5, 10)

    def function(item: int) -> int:
        if item == 5:
            raise RuntimeError("broken")
        time.sleep(0.01)
        return item

    results: list[int] = []
    with pytest.raises(RuntimeError, match="broken"):
        collect(parallel_map(function, items(), workers=3), results)
    assert results == [0, 1, 2, 3, 4]


def _recorded(produced: list[int], error: BaseException | None = None) -> Generator[int, None, None]:
    for item in range(10):
        produced.append(item)
        yield item
    if error is not None:
        raise error


def test_no_more_than_the_given_number_of_results_wait() -> None:
    produced: list[int] = []
    results = prefetch(_recorded(produced), 2, threading.Event())
    assert next(results) == 0
    deadline = time.monotonic() + 5
    while len(produced) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert produced == [0, 1, 2]  # one was consumed, two wait
    assert list(results) == list(range(1, 10))


def test_an_exception_in_the_thread_is_raised_after_the_results_before_it() -> None:
    results: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        collect(prefetch(_recorded([], KeyboardInterrupt()), 3, threading.Event()), results)
    assert results == list(range(10))


def test_closing_early_ends_the_thread_and_closes_the_results() -> None:
    closed = threading.Event()

    def results() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            closed.set()

    stopped = threading.Event()
    generator = prefetch(results(), 2, stopped)  # type: ignore[arg-type]
    next(generator)
    assert thread_names() == ["vit_probe-prefetch"]
    generator.close()
    assert stopped.is_set()
    assert closed.is_set()
