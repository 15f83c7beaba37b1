"""Work that the processes of torch.distributed share: items are dealt out in turn, results put back in their order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
_LOST = "transmute: all "
_OF_CONNECTIONS = ("gloo", "nccl", "connection", "timed out")  # torch has no class of its own for those of gloo


class Processes:
    """The processes of a group, each of which makes the same calls.

    Attributes:
        group: of torch.distributed; None for this process alone.
        rank: this one's number.
        size: how many there are.

    Args:
        distributed: False for this process alone, True for torch.distributed's default group, or a group.

    Raises:
        ValueError: a group that is none, that is not there yet, or that this process is not in.
    """

    def __init__(self, distributed: Any = False) -> None:
        self.group, self.rank, self.size = None, 0, 1
        if distributed is False:
            return
        ready = dist.is_available() and dist.is_initialized()
        group = dist.group.WORLD if ready and distributed is True else distributed
        if not (ready and isinstance(group, dist.ProcessGroup)):  # group.WORLD is None before there is one
            raise ValueError(
                f"transmute: distributed must be False, or True or a process group once there is one, got "
                f"{distributed!r}; call torch.distributed.init_process_group first"
            )
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("transmute: distributed must be a group that this process is in, got one of others")

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's items: every size-th, from the rank-th on."""
        return list(items[self.rank :: self.size])

    def everyone(self, mine: T) -> list[T]:
        """What each process has, by rank; values that pickle."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        with self.connected():
            dist.all_gather_object(found, mine, group=self.group)
        return found

    def gathered(self, mine: Sequence[T]) -> list[T]:
        """All items, from what each process has made of its share."""
        shares = self.everyone(list(mine))
        found: list[Any] = [None] * sum(map(len, shares))
        for rank, share in enumerate(shares):
            found[rank :: self.size] = share
        return found

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Says in a sentence that another process is lost.

        Raises:
            RuntimeError: instead of what torch.distributed raises.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if str(error).startswith(_LOST):
                raise
            reason = str(error).strip().splitlines()
            raise RuntimeError(
                f"{_LOST}{self.size} processes must go on, got a lost one, as process {self.rank} sees it "
                f"({reason[0] if reason else type(error).__name__}); see what it says, and start all of them again"
            ) from error

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """As connected, around work in which the model itself waits for the others; other errors are left as they are.

        Raises:
            RuntimeError: instead of what torch.distributed raises.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error).lower()
            if self.size == 1 or not any(name in text for name in _OF_CONNECTIONS):
                raise
            with self.connected():
                raise


ALONE = Processes()
