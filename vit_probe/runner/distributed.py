"""The processes that share the images of a run: which of them this one is, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self, TypeVar

from vit_probe.errors import InputError, ProcessGone, SharedInputError

__all__ = ["Processes"]

_START = timedelta(minutes=10)  # for all processes to come
# For all to be through with their shares. A process that ends breaks its connection, which the others see at once; a host that
# loses power or its network breaks none, and is waited for until whoever started the processes ends them.
_SHARE = timedelta(days=365)
_Value = TypeVar("_Value")


class Processes:
    """The processes that share the images of a run, and which of them this one is; one alone, unless told otherwise.

    All they tell each other goes to or from the first, and lies in the CPU's memory: it goes over gloo, and takes none of a
    GPU's memory. They meet when they first do something `together`; one process alone talks to nobody, and does not import
    `torch.distributed`.

    Args:
        rank: The number of this one, from 0.
        count: How many there are.
        local_rank: The number of this one among those on the same machine.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0) -> None:
        self.rank, self.count, self.local_rank = rank, count, local_rank
        self._group: Any = None
        self._meeting = False

    @classmethod
    def from_env(cls) -> Self:
        """What the environment says, as `torchrun` sets it; without it, one process.

        Raises:
            InputError: If the environment makes no sense.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        said = {name: os.environ[name] for name in names if name in os.environ}
        if "WORLD_SIZE" not in said or "RANK" not in said:
            return cls()
        if not all(value.isdecimal() for value in said.values()) or int(said["RANK"]) >= int(said["WORLD_SIZE"]):
            raise InputError(
                f"the environment says {' '.join(f'{name}={value}' for name, value in said.items())}, which is no process of "
                "several; start with torchrun, or unset these"
            )
        return cls(int(said["RANK"]), int(said["WORLD_SIZE"]), int(said.get("LOCAL_RANK", said["RANK"])))

    @property
    def is_main(self) -> bool:
        """Whether this is the one that gathers, writes and prints."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this process where all are told to use `name`: a GPU of its own, as long as there are enough."""
        if self.count == 1 or name not in ("auto", "cuda"):
            return name
        import torch

        return f"cuda:{self.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else name

    def init(self, limit: timedelta = _START) -> None:
        """Meets the others, unless that is done.

        Raises:
            InputError: If they cannot be met within `limit`.
        """
        if self.count == 1 or self._group is not None:
            return
        from torch import distributed

        self._meeting = True
        try:
            distributed.init_process_group("gloo", timeout=limit)
            distributed.barrier()  # all are there before they make the group whose limit is too long to wait for them
            self._group = distributed.new_group(timeout=_SHARE)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"the other processes cannot be met ({reason}); start all {self.count} with torchrun, or give each RANK, "
                "WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
            ) from error

    def leave(self) -> None:
        """Leaves the others, if it has met them."""
        if not self._meeting:
            return
        from torch import distributed

        self._group, self._meeting = None, False
        if distributed.is_initialized():
            distributed.destroy_process_group()

    def gather(self, value: _Value) -> list[_Value]:
        """In the first process the values of all, by rank; in the others nothing.

        Raises:
            ProcessGone: If one of them has ended.
        """
        if self.is_main:
            return [value, *(self._received(rank) for rank in range(1, self.count))]
        self._send(value, 0)
        return []

    def broadcast(self, value: _Value) -> _Value:
        """In all processes the value of the first.

        Raises:
            ProcessGone: If one of them has ended.
        """
        if not self.is_main:
            return self._received(0)
        for rank in range(1, self.count):
            self._send(value, rank)
        return value

    @contextmanager
    def barrier(self) -> Iterator[None]:
        """What is done within it succeeds in all processes or in none; all meet before it, and wait at its end for each other.

        Raises:
            InputError: If the others cannot be met.
            SharedInputError: In all, if one or more met an InputError; that of the lowest rank.
            ProcessGone: If one of them has ended.
        """
        if self.count == 1:
            yield
            return
        self.init()
        failure: InputError | None = None
        try:
            yield
        except InputError as error:
            failure = error
        met = self.gather(None if failure is None else str(failure))
        sentence = self.broadcast(next((sentence for sentence in met if sentence is not None), None))
        if sentence is not None:
            raise SharedInputError(sentence) from failure

    def _send(self, value: object, rank: int) -> None:
        from torch import distributed

        try:
            distributed.send_object_list([value], dst=rank, group=self._group)
        except RuntimeError as error:
            raise self._gone(rank) from error

    def _received(self, rank: int) -> Any:
        from torch import distributed

        value = [None]
        try:
            distributed.recv_object_list(value, src=rank, group=self._group)
        except RuntimeError as error:
            raise self._gone(rank) from error
        return value[0]

    def _gone(self, rank: int) -> ProcessGone:
        return ProcessGone(f"process {rank} of {self.count} (counted from 0) has ended before its time")
