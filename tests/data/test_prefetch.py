"""Work done prefetch in threads: in order, bounded, and nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterable, Iterator

import pytest

from vit_probe.data.prefetch import parallel_map, prefetch


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("vit_probe")]


def taken(results: Iterable[int], into: list[int]) -> None:
    """Goes through `results` as far as they can be had."""
    for result in results:
        into.append(result)


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    yield
    assert threads() == []


def test_results_keep_their_order_whoever_is_first() -> None:
    def slow_at_first(item: int) -> int:
        time.sleep(0.02 / (1 + item))
        return item * item

    assert list(parallel_map(slow_at_first, range(20), workers=4)) == [item * item for item in range(20)]


def test_several_at_once_but_no_more_than_twice_the_workers() -> None:
    both = threading.Barrier(2)
    assert list(parallel_map(lambda item: both.wait(timeout=5) >= 0, range(4), workers=2)) == [True] * 4
    drawn: list[int] = []
    results = parallel_map(lambda item: item, (drawn.append(item) or item for item in range(100)), workers=2)
    assert drawn == []
    for taken in range(1, 5):
        next(results)
        assert len(drawn) == taken + 3
    results.close()


@pytest.mark.parametrize("where", ["function", "items"])
def test_an_exception_comes_up_in_its_place(where: str) -> None:
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

    seen: list[int] = []
    with pytest.raises(RuntimeError, match="broken"):
        taken(parallel_map(function, items(), workers=3), seen)
    assert seen == [0, 1, 2, 3, 4]


def _counting(drawn: list[int], end: BaseException | None = None) -> Generator[int, None, None]:
    for item in range(10):
        drawn.append(item)
        yield item
    if end is not None:
        raise end


def test_so_many_ahead_and_no_more() -> None:
    drawn: list[int] = []
    results = prefetch(_counting(drawn), 2, threading.Event())
    assert next(results) == 0
    deadline = time.monotonic() + 5
    while len(drawn) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert drawn == [0, 1, 2]  # one was taken, two wait
    assert list(results) == list(range(1, 10))


def test_an_exception_ahead_comes_up_after_what_was_before() -> None:
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        taken(prefetch(_counting([], KeyboardInterrupt()), 3, threading.Event()), seen)
    assert seen == list(range(10))


def test_leaving_early_ends_the_thread_and_closes_the_results() -> None:
    closed = threading.Event()

    def results() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            closed.set()

    stopped = threading.Event()
    generator = prefetch(results(), 2, stopped)  # type: ignore[arg-type]
    next(generator)
    assert threads() == ["vit_probe-prefetch"]
    generator.close()
    assert stopped.is_set()
    assert closed.is_set()
