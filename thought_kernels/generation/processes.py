"""Work that the processes of torch.distributed share: items are dealt out in turn, results put back in their order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Processes:
    """The processes of a group, each of which makes the same calls.

    Attributes:
        group: of torch.distributed; None for this process alone.
        rank: this one's number.
        size: how many there are.

    Args:
        group: as the attribute.

    Raises:
        ValueError: a group that is none, or that this process is not in.
    """

    def __init__(self, group: Any = None) -> None:
        self.group, self.rank, self.size = group, 0, 1
        if group is None:
            return
        if not (dist.is_available() and dist.is_initialized() and isinstance(group, dist.ProcessGroup)):
            raise ValueError(
                f"transmute: group must be a process group of torch.distributed, got {group!r}; call "
                "torch.distributed.init_process_group and give torch.distributed.group.WORLD"
            )
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("transmute: group must hold this process, got one of others")

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
        except RuntimeError as error:
            reason = str(error).strip().splitlines()
            raise RuntimeError(
                f"transmute: all {self.size} processes must go on, got a lost one, as process {self.rank} sees it "
                f"({reason[0] if reason else type(error).__name__}); see what it says, and start all of them again"
            ) from error


ALONE = Processes()
