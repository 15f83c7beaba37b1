"""The experiments' pictures: accuracy against steps as in TP Figures 1 and 2, and patches added to each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thought_kernels.evaluation.experiments.composition import Together
from thought_kernels.evaluation.experiments.curves import PAPER_DIVISOR, Point
from thought_kernels.evaluation.pages.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    lattice,
    name_rows,
    percent,
    save_picture,
)

STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlelocation": "left",
    "axes.titleweight": "bold", "axes.titlesize": 11, "legend.frameon": False, "figure.facecolor": "white",
    "grid.color": "#e3e6ea",
}  # fmt: skip
_LOOKS = ((BLUE, "o"), (GREEN, "s"), (ORANGE, "^"))


def draw_experiment(
    title: str, lines: Sequence[tuple[str, Sequence[Point]]], prompted: float, base: float, path: Path,
    *, c1: float | None = None,
) -> None:  # fmt: skip
    """Writes one panel as a PNG, replacing the file in one step.

    Args:
        title: of the panel.
        lines: (label, points) each, three at most.
        prompted, base: accuracy with and without the instruction.
        path: of the PNG; its folder must exist.
        c1: of the paper's recipe, for a second axis of effective c1 above; None draws none.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(8.0, 4.6), layout="constrained")
        curve_axes(axes, lines, prompted, base)
        if c1 is not None:
            ratio = c1 / PAPER_DIVISOR
            above = axes.secondary_xaxis("top", functions=(lambda n: n * ratio, lambda c: c / ratio))
            above.set_xlabel(f"effective c₁ of the paper's settings, {c1:g} · steps / {PAPER_DIVISOR}", fontsize=9)
            above.tick_params(labelsize=9)
        axes.set_title(title)
        figure.legend(loc="outside lower left", fontsize=9)
        save_picture(figure, path)


def draw_composition(rows: Sequence[Together], path: Path) -> None:
    """Writes what becomes of each instruction when another's patch is added, and what was predicted, as a PNG.

    Args:
        rows: one for each ordered pair of instructions.
        path: of the PNG; its folder must exist.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [f"{row.name}, {row.other} added".replace("_", " ") for row in rows]
    with pyplot.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(9.6, 1.4 + 0.25 * len(rows)), width_ratios=(1.3, 1), layout="constrained"
        )
        for label, colour in (("patched", INK), ("in_turn", ORANGE), ("added", BLUE)):
            shown = {"patched": "own patch", "in_turn": "both in turn", "added": "sum"}[label]
            left.plot([getattr(row, label) for row in rows], range(len(rows)), "o", color=colour, label=shown)
        name_rows(left, names)
        left.set_xlim(-0.03, 1.03)
        percent(left.xaxis)
        left.set_title("accuracy")
        right.plot([row.predicted["disturbance"] for row in rows], [row.kl_lost for row in rows], "o", color=BLUE)
        right.set_xlabel("predicted disturbance")
        right.set_ylabel("KL lost, nats a token")
        right.set_title("measured against predicted")
        lattice(right, axis="both")
        figure.legend(loc="outside lower left", ncols=3)
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


def percent_axis(axes: Any, top: float) -> None:
    """A vertical axis from 0 to 100 %, with light lines."""
    axes.set_ylim(0, top)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    lattice(axes)
