"""What an experiment found, as data and as files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from thought_kernels.evaluation.experiments.curves import Point, Sample
from thought_kernels.evaluation.records.files import write_csv, write_json


@dataclass(frozen=True)
class Answer:
    """One question at one point of a line: the right answer, the prompted and the patched one, and their grades."""

    line: str
    steps: int
    query: str
    answer: str
    prompted: str
    patched: str
    prompted_grade: float
    patched_grade: float


@dataclass(frozen=True)
class Line:
    """One curve: its points, and one question answered at each.

    Attributes:
        name: of LINES.
        c1, c2: None for the default recipe.
        layers: 0-based blocks of the paper's recipe, None for the default recipe.
        points: with the bare model at 0 steps.
        samples: one per point, the questions in turn.
        sweep: what c1 was chosen from, (c1, accuracy, recovered effect) each; recovered is None where it is not finite.
    """

    name: str
    c1: float | None
    c2: float | None
    layers: list[int] | None
    points: list[Point]
    samples: list[Sample]
    sweep: list[tuple[float, float, float | None]] = field(default_factory=list)

    @property
    def best(self) -> Point:
        """The point of highest accuracy, the first of several."""
        return max(self.points, key=lambda point: (point.accuracy, -point.steps))

    @property
    def label(self) -> str:
        """What a legend says."""
        if self.layers is None:
            return "transmute's defaults"
        blocks = f"blocks {self.layers[0]}-{self.layers[-1]}"
        kinds = {"paper": "paper's settings", "tuned": "c₁ tuned here", "residual": "a before the norm, c₁ tuned here"}
        return f"{kinds[self.name]}, {blocks}, c₁ = {self.c1:g}" + (f", c₂ = {self.c2:g}" if self.c2 else "")


@dataclass(frozen=True)
class ExperimentReport:
    """An experiment's curves.

    Attributes:
        name, source: of the experiment.
        prompted, base: accuracy on the fresh inputs with and without the instruction.
        inputs: how many those are.
        lines: in the order of LINES.
        sampled: steps of the paper's table.
        settings: what the results depend on.
        answers: to every input, at each line's best and last points.
    """

    name: str
    source: str
    prompted: float
    base: float
    inputs: int
    lines: list[Line]
    sampled: tuple[int, ...]
    settings: dict[str, Any]
    answers: list[Answer]

    @property
    def told(self) -> str:
        """The instruction in a few words."""
        instruction = self.settings["instruction"]
        if isinstance(instruction, str):
            return instruction
        count = sum(turn["role"] == "assistant" for turn in instruction)
        shown = f"{count} demonstration{'' if count == 1 else 's'}"
        system = [turn["content"] for turn in instruction if turn["role"] == "system"]
        return ", ".join([*system, *([shown] if count else [])])

    def table(self, line: Line) -> list[Sample]:
        """The samples nearest to the steps of the paper's table."""
        nearest = [min(line.samples, key=lambda sample, n=n: abs(sample.steps - n)) for n in self.sampled]  # type: ignore[misc]
        return list(dict.fromkeys(nearest))


def write_results(report: ExperimentReport, output: Path) -> None:
    """Writes results.json, points.csv, samples.csv and answers.csv, each replaced in one step."""
    found = asdict(report)
    answers = found.pop("answers")
    write_json(found, output / "results.json")
    points = [
        {"experiment": report.name, "line": line.name, "c1": line.c1, "c2": line.c2, **asdict(point)}
        for line in report.lines
        for point in line.points
    ]
    samples = [{"line": line.name, **asdict(sample)} for line in report.lines for sample in line.samples]
    write_csv(points, output / "points.csv")
    write_csv(samples, output / "samples.csv")
    write_csv(answers, output / "answers.csv")
