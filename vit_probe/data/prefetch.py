"""Work done ahead of whoever needs it: in threads, in order, a bounded way ahead, and with no thread left behind."""

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
    """`function` of each of `items`, in order, computed by threads; at most `2 * workers` items are under way.

    Items are drawn one at a time, by whoever draws the results. An exception, of `function` or of drawing an item, comes
    up in its own place, after the results before it. When the generator ends or is closed its threads have ended.
    """
    failure: Exception | None = None
    pending: deque[Future[Result]] = deque()
    drawn = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="vit_probe-worker") as pool:
        try:
            while failure is None:
                try:
                    item = next(drawn)
                except StopIteration:
                    break
                except Exception as error:
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
    """The same `results`, drawn by a thread up to `count` ahead.

    When the generator ends or is closed, `stopped` is set, for `results` to notice that no more are wanted, and its thread
    has ended. An exception of `results` comes up after the results before it.
    """
    ready: SimpleQueue[tuple[Result] | BaseException | None] = SimpleQueue()
    room = Semaphore(count)

    def draw() -> None:
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

    thread = Thread(target=draw, name="vit_probe-prefetch", daemon=True)
    thread.start()
    try:
        while isinstance(result := ready.get(), tuple):
            room.release()
            yield result[0]
        if result is not None:
            raise result
    finally:
        stopped.set()
        room.release()
        thread.join()
