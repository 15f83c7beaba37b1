"""What the pictures share: their look, a pyplot without a window, and how they are saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thought_kernels.evaluation.pages.drawing import INK, lattice, need_installed
from thought_kernels.evaluation.records.files import replace_file

_STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlelocation": "left",
    "axes.titleweight": "bold", "axes.titlesize": 11, "legend.frameon": False, "figure.facecolor": "white",
    "grid.color": "#e3e6ea",
}  # fmt: skip


def check_pictures(function: str) -> None:
    """Raises ValueError where a picture cannot be drawn here; `function` opens the sentence."""
    need_installed(function, "draw a picture", "matplotlib")


@contextlib.contextmanager
def pyplot_without_window() -> Iterator[Any]:
    """matplotlib's pyplot in the pictures' look; what is drawn goes to files only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE):
        yield pyplot


def save_picture(figure: Any, path: Path) -> None:
    """Writes a pyplot figure as a PNG, replacing the file in one step, and closes it."""
    from matplotlib import pyplot

    try:
        replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    finally:
        pyplot.close(figure)


def percent_axis(axes: Any, top: float) -> None:
    """A vertical axis from 0 to 100 %, with light lines."""
    axes.set_ylim(0, top)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    lattice(axes)
