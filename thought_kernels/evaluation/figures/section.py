"""One part of the report: what was measured, as figures with their intervals, and what to know about them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from thought_kernels.evaluation.measures.intervals import Interval


@dataclass(frozen=True)
class Figure:
    """One number of the report.

    Attributes:
        subject: what was measured: "patched", "random matrix", "Reverse the list", ...
        quantity: "accuracy", "recovered", ...; the notes of its section say what it means.
        value: the number; NaN where it is not defined.
        low, high: ends of its 95 % interval, NaN without one.
        inputs: how many inputs it was measured on, 0 where that has no meaning.
        x: the swept setting (a scale, a number of examples, a token's position), None where nothing is swept.
    """

    subject: str
    quantity: str
    value: float
    low: float = math.nan
    high: float = math.nan
    inputs: int = 0
    x: float | None = None


@dataclass
class Section:
    """One part of the report.

    Attributes:
        name: its key.
        title: its heading.
        figures: its numbers.
        notes: sentences on how they were made.
        samples: rows of example answers, a dict of texts each.
        error: the sentence of what went wrong, if it did; figures are then those measured before.
        status: "done", "failed", or "left out" where the error says what it needs and nobody gave.
        seconds: wall-clock time taken.
        expected_seconds: what was expected before, None where nothing was.
        peak_memory_mib: largest resident memory of the process while it ran, MiB; device_memory_mib the same on the
            model's accelerator, None on a CPU.
    """

    name: str
    title: str
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    error: str | None = None
    status: str = "done"
    seconds: float = 0.0
    expected_seconds: float | None = None
    peak_memory_mib: float | None = None
    device_memory_mib: float | None = None

    def add(
        self, subject: str, quantity: str, value: float | Interval, *, inputs: int = 0, x: float | None = None
    ) -> None:
        """Appends a figure, with its interval where one is given."""
        low, high = (value.low, value.high) if isinstance(value, Interval) else (math.nan, math.nan)
        number = value.value if isinstance(value, Interval) else float(value)
        self.figures.append(Figure(subject, quantity, number, low, high, inputs, x))

    def note(self, sentence: str) -> None:
        """Appends a sentence that is not there yet."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def get(self, subject: str, quantity: str, x: float | None = None) -> Figure | None:
        """The figure of a subject and quantity, None where it was not measured."""
        for figure in self.figures:
            if (figure.subject, figure.quantity, figure.x) == (subject, quantity, x):
                return figure
        return None

    def subjects(self, quantity: str | None = None) -> list[str]:
        """Subjects in the order of their first figure, those with one of a quantity only where it is named."""
        return list(dict.fromkeys(f.subject for f in self.figures if quantity in (None, f.quantity)))

    def series(self, subject: str, quantity: str) -> list[Figure]:
        """A swept subject's figures by ascending x."""
        found = [f for f in self.figures if (f.subject, f.quantity) == (subject, quantity) and f.x is not None]
        return sorted(found, key=lambda figure: figure.x or 0.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; NaN becomes None."""
        return jsonable(asdict(self))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Section:
        """What to_dict made."""
        numbers = ("value", "low", "high")
        figures = []
        for row in content["figures"]:
            values: dict[str, Any] = dict(row)
            for key in numbers:
                values[key] = math.nan if values[key] is None else values[key]
            figures.append(Figure(**values))
        return cls(**{**content, "figures": figures})


def jsonable(value: Any) -> Any:
    """Nested dicts and lists with None in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
