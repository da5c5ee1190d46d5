"""The group of processes that share the images of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self, TypeVar

from vit_probe.errors import InputError, ProcessExited, SharedInputError

__all__ = ["ProcessGroup"]

_CONNECT_TIMEOUT = timedelta(minutes=10)
# For the processes to finish their shares, which may take very different times. It need not detect failures: a process that
# exits closes its connections, which the others notice at once. (A host that loses power or its network closes none; then the
# others wait until whoever started them stops them.)
_RUN_TIMEOUT = timedelta(days=365)
_Value = TypeVar("_Value")


class ProcessGroup:
    """The processes that share the images of a run, and the place of this one among them; by default, this one alone.

    All communication goes to or from the main process (rank 0), over gloo and through CPU memory: it takes no GPU memory.
    The processes connect at the first `barrier`. A single process does not import `torch.distributed`.

    Args:
        rank: Index of this process, from 0.
        world_size: Number of processes.
        local_rank: Index of this process among those on the same machine.

    Examples:
        >>> processes = ProcessGroup()
        >>> processes.is_main, processes.gather("value"), processes.broadcast("value")
        (True, ['value'], 'value')
        >>> ProcessGroup(rank=1, world_size=2).is_main
        False
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self._group: Any = None
        self._connecting = False

    @classmethod
    def from_env(cls) -> Self:
        """The group that the environment variables of `torchrun` describe; without them, a single process.

        Raises:
            InputError: If the variables are invalid.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        values = {name: os.environ[name] for name in names if name in os.environ}
        if "WORLD_SIZE" not in values or "RANK" not in values:
            return cls()
        if not all(value.isdecimal() for value in values.values()) or int(values["RANK"]) >= int(values["WORLD_SIZE"]):
            raise InputError(
                f"the environment variables {' '.join(f'{name}={value}' for name, value in values.items())} are invalid: they "
                "must be integers with RANK from 0 to WORLD_SIZE - 1; start the processes with torchrun, or unset the variables"
            )
        return cls(int(values["RANK"]), int(values["WORLD_SIZE"]), int(values.get("LOCAL_RANK", values["RANK"])))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that gathers, writes and prints."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device that this process uses for `name`: for `auto` and `cuda` a GPU of its own, if there are enough."""
        if self.world_size == 1 or name not in ("auto", "cuda"):
            return name
        import torch

        return f"cuda:{self.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else name

    def init(self, timeout: timedelta = _CONNECT_TIMEOUT) -> None:
        """Connect to the other processes, unless that is done already.

        Raises:
            InputError: If they cannot be reached within `timeout`.
        """
        if self.world_size == 1 or self._group is not None:
            return
        from torch import distributed

        if not distributed.is_available():
            raise InputError("this build of torch cannot connect processes; start a single one, or install another build")
        self._connecting = True
        try:
            distributed.init_process_group("gloo", timeout=timeout)
            # All are there before they make the group for the run, whose timeout is too long to wait for a missing one.
            distributed.barrier()
            self._group = distributed.new_group(timeout=_RUN_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"cannot connect to the other processes ({reason}); start all {self.world_size} with torchrun, or set RANK, "
                "WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each"
            ) from error

    def destroy(self) -> None:
        """Disconnect from the other processes, if connected."""
        if not self._connecting:
            return
        from torch import distributed

        self._group, self._connecting = None, False
        if distributed.is_initialized():
            distributed.destroy_process_group()

    def gather(self, value: _Value) -> list[_Value]:
        """In the main process the values of all processes, by rank; in the others an empty list.

        Raises:
            ProcessExited: If one of them has exited.
        """
        if self.is_main:
            return [value, *(self._receive(rank) for rank in range(1, self.world_size))]
        self._send(value, 0)
        return []

    def broadcast(self, value: _Value) -> _Value:
        """In all processes the value of the main process.

        Raises:
            ProcessExited: If one of them has exited.
        """
        if not self.is_main:
            return self._receive(0)
        for rank in range(1, self.world_size):
            self._send(value, rank)
        return value

    @contextmanager
    def barrier(self) -> Iterator[None]:
        """Context manager whose body succeeds in all processes or fails in all; they wait for each other at its end.

        Connects to the other processes first, if that is not done.

        Raises:
            InputError: If the others cannot be reached.
            SharedInputError: In all processes, if the body raised an InputError in any; with the message of the lowest rank.
            ProcessExited: If one of them has exited.
        """
        if self.world_size == 1:
            yield
            return
        self.init()
        failure: InputError | None = None
        try:
            yield
        except InputError as error:
            failure = error
        messages = self.gather(None if failure is None else str(failure))
        message = self.broadcast(next((message for message in messages if message is not None), None))
        if message is not None:
            raise SharedInputError(message) from failure

    # Point to point rather than by collectives, which fail without saying which process has exited.

    def _send(self, value: object, rank: int) -> None:
        from torch import distributed

        try:
            distributed.send_object_list([value], dst=rank, group=self._group)
        except RuntimeError as error:
            raise self._exited(rank) from error

    def _receive(self, rank: int) -> Any:
        from torch import distributed

        value = [None]
        try:
            distributed.recv_object_list(value, src=rank, group=self._group)
        except RuntimeError as error:
            raise self._exited(rank) from error
        return value[0]

    def _exited(self, rank: int) -> ProcessExited:
        return ProcessExited(f"process {rank} of {self.world_size} (counting from 0) exited before the run was complete")
