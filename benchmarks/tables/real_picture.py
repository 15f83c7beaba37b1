"""The README's picture: word tasks on a real model, bare, prompted and patched, from the rows of real/run.py.

Drawings differ from one matplotlib to the next, so the picture carries a digest of the rows it shows and of this file.
It is drawn anew when that has changed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from real_tables import MODELS, Row, average, grouped, patches

from thought_kernels.evaluation.pages.drawing import BLUE, GREY, INK
from thought_kernels.evaluation.pictures.canvas import percent_axis, pyplot_without_window
from thought_kernels.evaluation.records.files import replace_file

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "pictures" / "words.svg"
MODEL, INPUTS = "gemma", "32"
BARS = (
    ("bare", GREY, "bare"),
    ("prompted", INK, "prompted with eight demonstrations"),
    ("patched", BLUE, "patched, no prompt"),
)


def rows() -> dict[str, list[Row]]:
    """The rows of each task that no choice was made on, one for a seed."""
    found = grouped(patches(model=MODEL, kind="word", reserved="True", inputs=INPUTS), "task")
    return {task: mine for (task,), mine in found.items()}


def digest() -> str:
    """Of everything that the picture depends on but matplotlib."""
    return hashlib.sha256(Path(__file__).read_bytes() + repr(rows()).encode()).hexdigest()


def is_current() -> bool:
    return PICTURE.is_file() and digest() in PICTURE.read_text(encoding="utf-8")


def draw() -> None:
    """Writes the picture, replacing the file in one step."""
    PICTURE.parent.mkdir(exist_ok=True)
    with pyplot_without_window() as pyplot, pyplot.rc_context({"svg.hashsalt": "words"}):
        figure, axes = pyplot.subplots(figsize=(8.4, 4), layout="constrained")
        fill(axes, rows())
        about = {"Date": None, "Creator": None, "Description": f"drawn from {digest()}"}
        replace_file(PICTURE, lambda path: figure.savefig(path, format="svg", metadata=about))
        pyplot.close(figure)


def fill(axes: Any, tasks: dict[str, list[Row]]) -> None:
    """Three bars a task, with their values, and the effect recovered below its name."""
    width = 0.27
    for shift, (name, colour, label) in enumerate(BARS):
        places = [index + (shift - 1) * width for index in range(len(tasks))]
        values = [average(mine, name) for mine in tasks.values()]
        bars = axes.bar(places, values, width * 0.94, color=colour, label=label)
        axes.bar_label(bars, [f"{100 * value:.0f}" for value in values], padding=1, fontsize=8, color=INK)
    axes.set_xticks(range(len(tasks)), [task.replace("-", "\nto ") for task in tasks])
    axes.tick_params(axis="x", length=0)
    effects = [f"{100 * average(mine, 'recovered'):.1f} %" for mine in tasks.values()]
    for place, text in zip((-0.85, *range(len(tasks))), ("effect\nrecovered", *effects), strict=True):
        axes.annotate(
            text, (place, 0), xytext=(0, -42), textcoords="offset points", ha="center", va="center", color=BLUE,
            weight="bold", annotation_clip=False,
        )  # fmt: skip
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    percent_axis(axes, 1.08)
    axes.set_ylabel("accuracy on words held out")
    axes.set_title(f"{MODELS[MODEL]}, patched from {INPUTS} words and no answers", pad=26)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(BARS), borderaxespad=0.2, handlelength=1.1)
