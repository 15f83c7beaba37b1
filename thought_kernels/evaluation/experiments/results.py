"""What an experiment found, as data and as files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thought_kernels.evaluation.experiments.curves import Point, Sample
from thought_kernels.evaluation.records.files import write_csv, write_json


@dataclass(frozen=True)
class Line:
    """One curve: its points, and one question answered at each.

    Attributes:
        name: of LINES.
        c1, c2: None for the default recipe.
        layers: 0-based blocks of the paper's recipe, None for the default recipe.
        points: with the bare model at 0 steps.
        samples: one per point, the questions in turn.
    """

    name: str
    c1: float | None
    c2: float | None
    layers: list[int] | None
    points: list[Point]
    samples: list[Sample]

    @property
    def label(self) -> str:
        """What a legend says."""
        if self.layers is None:
            return "transmute's defaults"
        blocks = f"blocks {self.layers[0]}-{self.layers[-1]}"
        kind = "paper's settings" if self.name == "paper" else "paper's recipe, c₁ tuned here"
        return f"{kind}, {blocks}, c₁ = {self.c1:g}" + (f", c₂ = {self.c2:g}" if self.c2 else "")


@dataclass(frozen=True)
class ExperimentReport:
    """An experiment's curves.

    Attributes:
        name, source: of the experiment.
        prompted, base: accuracy on the fresh inputs with and without the instruction.
        inputs: how many those are.
        lines: in the order of LINES.
        sweep: (c1, accuracy, recovered effect) each, of the tuned line; recovered is None where it is not finite.
        sampled: steps of the paper's table.
        settings: what the results depend on.
    """

    name: str
    source: str
    prompted: float
    base: float
    inputs: int
    lines: list[Line]
    sweep: list[tuple[float, float, float | None]]
    sampled: tuple[int, ...]
    settings: dict[str, Any]

    def table(self, line: Line) -> list[Sample]:
        """The samples nearest to the steps of the paper's table."""
        nearest = [min(line.samples, key=lambda sample, n=n: abs(sample.steps - n)) for n in self.sampled]  # type: ignore[misc]
        return list(dict.fromkeys(nearest))


def write_results(report: ExperimentReport, output: Path) -> None:
    """Writes results.json, points.csv and samples.csv, each replaced in one step."""
    write_json(asdict(report), output / "results.json")
    points = [
        {"experiment": report.name, "line": line.name, "c1": line.c1, "c2": line.c2, **asdict(point)}
        for line in report.lines
        for point in line.points
    ]
    samples = [{"line": line.name, **asdict(sample)} for line in report.lines for sample in line.samples]
    write_csv(points, output / "points.csv")
    write_csv(samples, output / "samples.csv")
