"""Examples that cannot be read: the first one stops a run, or they are left out and named at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_Read = TypeVar("_Read")

CHOICES = ("stop", "skip")
_SHOWN = 3  # of those that were left out


class BadExamples:
    """What is done with them.

    Args:
        choice: "stop" or "skip".

    Attributes:
        left_out: what was wrong, a sentence each.

    Raises:
        ValueError: another choice.
    """

    def __init__(self, choice: str = "stop") -> None:
        if choice not in CHOICES:
            raise ValueError(f"transmute: bad_examples must be one of {', '.join(CHOICES)}, got {choice!r}")
        self._skip = choice == "skip"
        self.left_out: list[str] = []

    def read(self, function: Callable[..., _Read], *arguments: Any) -> _Read | None:
        """What the function makes of one example; None where it raises ValueError or TypeError, which is kept."""
        try:
            return function(*arguments)
        except (ValueError, TypeError) as error:
            if not self._skip:
                raise
            self.left_out.append(str(error))
            return None

    def sentence(self, kept: int) -> str:
        """What was left out, for a warning; raises ValueError where nothing is left.

        Args:
            kept: the examples that could be read.
        """
        shown = "; ".join(f"({number}) {error}" for number, error in enumerate(self.left_out[:_SHOWN], start=1))
        more = len(self.left_out) - _SHOWN
        shown += f"; and {more} more" if more > 0 else ""
        if not kept:
            raise ValueError(f"transmute: examples must hold at least one that can be read, got none; {shown}")
        return f"transmute: {len(self.left_out)} of {kept + len(self.left_out)} examples are left out: {shown}"
