"""Examples that cannot be read: the first one stops a run, or they are left out and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

_Read = TypeVar("_Read")

CHOICES = ("stop", "skip")
_SHOWN = 3  # of those that were left out, in a warning
_KEPT = 100  # places in a provenance


class BadExamples:
    """What is done with them.

    Args:
        choice: "stop" or "skip".

    Attributes:
        left_out: of each that was left out its place, and what was wrong.

    Raises:
        ValueError: another choice.
    """

    def __init__(self, choice: str = "stop") -> None:
        if choice not in CHOICES:
            raise ValueError(
                f"transmute: bad_examples must be one of {', '.join(CHOICES)}, got {choice!r}; 'skip' leaves examples "
                "out that cannot be read"
            )
        self._skip = choice == "skip"
        self.left_out: list[tuple[str, str]] = []

    def read(self, place: str, function: Callable[..., _Read], *arguments: Any) -> _Read | None:
        """What the function makes of one example; None where it raises ValueError or TypeError and it is left out."""
        try:
            return function(*arguments)
        except (ValueError, TypeError) as error:
            if not self._skip:
                raise
            self.left_out.append((place, str(error)))
            return None

    def sentence(self, kept: int) -> str:
        """What was left out, for a warning; raises ValueError where nothing is left.

        Args:
            kept: the examples that could be read.
        """
        shown = "; ".join(f"({number}) {error}" for number, (_, error) in enumerate(self.left_out[:_SHOWN], start=1))
        more = len(self.left_out) - _SHOWN
        shown += f"; and {more} more" if more > 0 else ""
        if not kept:
            raise ValueError(f"transmute: examples must hold at least one that can be read, got none; {shown}")
        return f"transmute: {len(self.left_out)} of {kept + len(self.left_out)} examples are left out: {shown}"

    def told(self) -> dict[str, Any]:
        """For a patch's provenance, which may be published: how many, and the places of the first, without texts."""
        places = [_without_folder(place) for place, _ in self.left_out[:_KEPT]]
        return {"count": len(self.left_out), "places": places}


def _without_folder(place: str) -> str:
    path, line, number = place.rpartition(", line ")
    return f"{Path(path).name}{line}{number}" if line else place
