"""What the report's plots share: colours, points and lines with their intervals, axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

from thought_kernels.evaluation.figures.section import Figure

# Okabe and Ito's palette: apart for colour-blind readers, and by lightness in print.
GREY, BLUE, ORANGE, GREEN, RED, INK = "#a9adb3", "#0072b2", "#e69f00", "#009e73", "#c0392b", "#30343a"
COLOURS = {"bare": GREY, "prompted": INK, "patched": BLUE}
FLOOR = -0.25  # recovered effects below this are drawn at the edge, since ‑40 and ‑4 say the same


def need_installed(function: str, purpose: str, *packages: str) -> None:
    """Raises ValueError where packages are missing: before anything is computed, not when it is to be drawn."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{function}: {' and '.join(missing)} must be installed to {purpose}, got none; "
            "pip install 'thought_kernels[demo]'"
        )


def dot(axes: Any, row: float, figure: Figure, colour: str) -> None:
    """A figure with its interval in a row of its own."""
    value = max(figure.value, FLOOR)
    if not math.isnan(figure.low):
        axes.plot([max(figure.low, FLOOR), max(figure.high, FLOOR)], [row, row], color=colour, linewidth=2, alpha=0.55)
    axes.plot([value], [row], marker="<" if figure.value < FLOOR else "o", markersize=6, color=colour, zorder=3)


def line(axes: Any, figures: Sequence[Figure], colour: str, label: str, *, floor: float = -math.inf) -> None:
    """Figures against their x, with a band where all have intervals; values below the floor are drawn at it."""
    known = [figure for figure in figures if not math.isnan(figure.value)]
    if not known:
        return
    xs = [figure.x for figure in known]
    axes.plot(
        xs, [max(figure.value, floor) for figure in known], color=colour, marker="o", markersize=4.5, label=label,
        linewidth=1.8, zorder=3,
    )  # fmt: skip
    if not any(math.isnan(figure.low) for figure in known):
        lows, highs = ([max(getattr(figure, end), floor) for figure in known] for end in ("low", "high"))
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0)


def legend(axes: Any, place: str) -> None:
    """A legend, where something has a label."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=place)


def logarithmic(axis: Any) -> None:
    """A logarithmic axis for what is drawn already; over less than two decades 1, 2 and 5 of each are labelled."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    if high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def percent(axis: Any) -> None:
    """Shares from 0 to 1 as per cent."""
    axis.set_ticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])


def lattice(*panels: Any, axis: Literal["x", "y", "both"] = "y") -> None:
    """Light lines behind what is drawn."""
    for axes in panels:
        axes.grid(axis=axis)
        axes.set_axisbelow(True)


def name_rows(axes: Any, names: Sequence[str]) -> None:
    """A row for each name, the first on top, values to the right."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    lattice(axes, axis="x")


def block_axis(axes: Any) -> None:
    """Whole blocks to the right."""
    axes.set_xlabel("block (0-based)")
    axes.xaxis.get_major_locator().set_params(integer=True)
