"""The demonstration as one picture: bars per instruction, and the paper's curve beside ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from thought_kernels.demo.curves import Curve
from thought_kernels.demo.demo import DemoReport, Row
from thought_kernels.demo.tasks import RESERVED_FOR_FINAL_STUDY, TASKS
from thought_kernels.evaluation.pages.drawing import BLUE, GREY, INK, ORANGE
from thought_kernels.evaluation.pictures.canvas import percent_axis, pyplot_without_window, save_picture
from thought_kernels.evaluation.pictures.curves import curve_axes

_BARS: tuple[tuple[str, str, Callable[[Row], float]], ...] = (
    ("bare", GREY, lambda row: row.base),
    ("prompted", INK, lambda row: row.prompted),
    ("patched, no instruction", BLUE, lambda row: row.patched),
    ("patched, numbers or words not in its examples", ORANGE, lambda row: row.patched_outside),
)


def draw(report: DemoReport, path: Path) -> None:
    """Writes the report as a PNG, replacing the file in one step.

    Args:
        report: with at least one row.
        path: of the PNG; its folder must exist.
    """
    columns = max(len(report.curves), 1)
    rows = 2 if report.curves else 1
    with pyplot_without_window() as pyplot:
        figure = pyplot.figure(figsize=(max(9.0, 0.72 * len(report.rows) + 1.5), 4.1 * rows), layout="constrained")
        grid = figure.add_gridspec(rows, columns, hspace=0.08)
        _bars(figure.add_subplot(grid[0, :]), report)
        for index, curve in enumerate(report.curves):
            _curve(figure.add_subplot(grid[1, index]), curve)
        save_picture(figure, path)


def _bars(axes: Any, report: DemoReport) -> None:
    width = 0.8 / len(_BARS)
    for shift, (label, colour, value) in enumerate(_BARS):
        places = [index + (shift - (len(_BARS) - 1) / 2) * width for index in range(len(report.rows))]
        axes.bar(places, [value(row) for row in report.rows], width * 0.92, color=colour, label=label)
    axes.set_xticks(
        range(len(report.rows)), [row.name.replace("_", " ") + "*" * row.reserved for row in report.rows],
        rotation=30 if len(report.rows) > 8 else 0, ha="right" if len(report.rows) > 8 else "center",
    )  # fmt: skip
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(report.rows) - 0.4)
    percent_axis(axes, 1.0)
    axes.set_ylabel("accuracy on fresh inputs")
    axes.set_title(f"The same weights: bare, prompted, patched with {report.settings['examples']} examples", pad=30)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(_BARS), borderaxespad=0.3, handlelength=1.1)
    if any(row.reserved for row in report.rows):
        axes.annotate(
            "* nothing was chosen on these", (1, 1.02), xycoords="axes fraction", ha="right", va="bottom", fontsize=9
        )


def _curve(axes: Any, curve: Curve) -> None:
    label = f"paper's recipe, blocks {curve.layers[0]}-{curve.layers[-1]}, c₁ = {curve.c1:g}"
    curve_axes(axes, [("default settings", curve.default), (label, curve.paper)], curve.prompted)
    axes.set_title(TASKS[curve.name].instruction + "*" * (curve.name in RESERVED_FOR_FINAL_STUDY))
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.5), fontsize=9)
