"""The report as data: its sections, what follows from them, and what makes it comparable; JSON and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from thought_kernels.evaluation.figures.section import Section, jsonable

FORMAT = 2
CSV_COLUMNS = ("section", "subject", "quantity", "x", "value", "low", "high", "inputs")


@dataclass(frozen=True)
class Line:
    """One line of the verdict.

    Attributes:
        question: what it answers.
        status: "yes", "partly", "no" or "unknown".
        answer: one sentence with the figures it follows from.
    """

    question: str
    status: str
    answer: str


@dataclass
class Report:
    """Everything that was measured, as data.

    Attributes:
        settings: what was evaluated and how, JSON values.
        sections: by name, in the page's order.
        verdict: five lines computed from the figures.
        warnings: sentences about the data.
        seconds: wall-clock time of the whole.
    """

    settings: dict[str, Any]
    sections: dict[str, Section]
    verdict: list[Line]
    warnings: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; NaN becomes None."""
        return {
            "format": FORMAT,
            "verdict": [asdict(line) for line in self.verdict],
            "warnings": list(self.warnings),
            "settings": jsonable(self.settings),
            "seconds": self.seconds,
            "sections": {name: section.to_dict() for name, section in self.sections.items()},
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per figure, with CSV_COLUMNS as keys."""
        for name, section in self.sections.items():
            for figure in section.figures:
                yield {"section": name, **{key: getattr(figure, key) for key in CSV_COLUMNS[1:]}}
            yield {"section": name, "subject": "section", "quantity": "seconds", "value": section.seconds}
            for quantity in ("expected_seconds", "peak_memory_mib", "device_memory_mib"):
                if getattr(section, quantity) is not None:
                    value = getattr(section, quantity)
                    yield {"section": name, "subject": "section", "quantity": quantity, "value": value}

    def to_csv(self) -> str:
        """The figures as CSV text; NaN is an empty cell."""
        text = io.StringIO()
        writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in self.rows():
            writer.writerow({key: "" if _is_nan(value) else value for key, value in row.items()})
        return text.getvalue()


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
