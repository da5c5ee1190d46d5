"""Preparing results in threads, ahead of their use: in order, bounded, and without leaving a thread behind."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import TypeVar

__all__ = ["WORKERS", "parallel_map", "prefetch"]

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKERS = min(4, os.cpu_count() or 1)


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int = WORKERS
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in order, computed by a pool of threads.

    Items are taken one at a time, in the thread that consumes the results, and at most `2 * workers` of them are being
    worked on or waiting. An exception of `function`, or of taking an item, is raised after the results before it. All
    threads have ended when the generator is exhausted or closed.

    Args:
        function: Called in the threads of the pool.
        items: Its arguments.
        workers: Number of threads.

    Examples:
        >>> list(parallel_map(len, ["one", "three", "eleven"], workers=2))
        [3, 5, 6]
    """
    failure: Exception | None = None
    pending: deque[Future[Result]] = deque()
    remaining = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="vit_probe-worker") as pool:
        try:
            while failure is None:
                try:
                    item = next(remaining)
                except StopIteration:
                    break
                except Exception as error:  # raised below, after the results of the items before it
                    failure = error
                    break
                pending.append(pool.submit(function, item))
                if len(pending) >= 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
    if failure is not None:
        raise failure


def prefetch(results: Generator[Result, None, None], count: int, stopped: Event) -> Generator[Result]:
    """Yield the same `results`, which a thread takes from their generator up to `count` ahead.

    An exception of `results` is raised after the results before it. The thread has ended when the generator is exhausted
    or closed.

    Args:
        results: Closed by the thread at the end.
        count: Number of results that may wait.
        stopped: Set when no more results are needed. A generator that does much work per result can check it and end early.

    Examples:
        >>> from threading import Event
        >>> list(prefetch((number**2 for number in range(5)), count=2, stopped=Event()))
        [0, 1, 4, 9, 16]
    """
    ready: SimpleQueue[tuple[Result] | BaseException | None] = SimpleQueue()
    # Counts the free places. A queue with a maximum size would block the thread in `put`, where nothing could wake it.
    room = Semaphore(count)

    def produce() -> None:
        end: BaseException | None = None
        try:
            with closing(results):
                while room.acquire() and not stopped.is_set():
                    ready.put((next(results),))
        except StopIteration:
            pass
        except BaseException as error:
            end = error
        ready.put(end)

    thread = Thread(target=produce, name="vit_probe-prefetch", daemon=True)
    thread.start()
    try:
        while isinstance(result := ready.get(), tuple):
            room.release()
            yield result[0]
        if result is not None:
            raise result
    finally:
        stopped.set()
        room.release()  # wakes the thread if it waits for a place
        thread.join()
