"""Accuracy against steps, as in TP Figures 1 and 2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thought_kernels.evaluation.experiments.curves import Point
from thought_kernels.evaluation.experiments.results import ExperimentReport
from thought_kernels.evaluation.pages.drawing import BLUE, GREEN, GREY, INK, ORANGE, RED
from thought_kernels.evaluation.pictures.canvas import percent_axis, pyplot_without_window, save_picture
from thought_kernels.evaluation.rivals.paper import PAPER_DIVISOR

_LOOKS = ((BLUE, "o"), (GREEN, "s"), (ORANGE, "^"), (RED, "D"))


def draw_experiment(report: ExperimentReport, path: Path) -> None:
    """Writes an experiment's lines as a PNG, replacing the file in one step.

    Args:
        report: of four lines at most; where the paper's is among them a second axis above shows its effective c1.
        path: of the PNG; its folder must exist.
    """
    paper = next((line for line in report.lines if line.name == "paper"), None)
    with pyplot_without_window() as pyplot:
        figure, axes = pyplot.subplots(figsize=(8.0, 4.6), layout="constrained")
        curve_axes(axes, [(line.label, line.points) for line in report.lines], report.prompted, report.base)
        if paper is not None and paper.c1 is not None:
            ratio = paper.c1 / PAPER_DIVISOR
            above = axes.secondary_xaxis("top", functions=(lambda n: n * ratio, lambda c: c / ratio))
            above.set_xlabel(f"effective c₁ of the paper's settings, {paper.c1:g} · steps / {PAPER_DIVISOR}", size=9)
            above.tick_params(labelsize=9)
        axes.set_title(f"{report.told}, {report.inputs} inputs")
        figure.legend(loc="outside lower left", fontsize=9)
        save_picture(figure, path)


def curve_axes(
    axes: Any, lines: Sequence[tuple[str, Sequence[Point]]], prompted: float, base: float | None = None
) -> None:
    """Draws lines of accuracy against steps, and the prompted accuracy as a dashed one."""
    levels = [("prompted", prompted)] + ([("bare", base)] if base is not None else [])
    for name, level in levels:
        axes.axhline(level, color=INK if name == "prompted" else GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            name, (1, level), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
            ha="right", fontsize=9,
        )  # fmt: skip
    for (label, points), (colour, marker) in zip(lines, _LOOKS, strict=False):
        axes.plot(
            [point.steps for point in points], [point.accuracy for point in points], color=colour, marker=marker,
            markersize=4.5, linewidth=1.8, label=label, clip_on=False, zorder=3,
        )  # fmt: skip
    percent_axis(axes, 1.05)
    axes.set_xlim(0, None)
    axes.set_xlabel("steps (examples)")
    axes.set_ylabel("accuracy without the instruction")
