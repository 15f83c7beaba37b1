"""Patches added to each other: what becomes of each instruction, and what was predicted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from thought_kernels.evaluation.experiments.composition import Together
from thought_kernels.evaluation.pages.drawing import BLUE, INK, ORANGE, lattice, name_rows, percent
from thought_kernels.evaluation.pictures.canvas import pyplot_without_window, save_picture


def draw_composition(rows: Sequence[Together], path: Path) -> None:
    """Writes what becomes of each instruction when another's patch is added, and what was predicted, as a PNG.

    Args:
        rows: one for each ordered pair of instructions.
        path: of the PNG; its folder must exist.
    """
    names = [f"{row.name}, {row.other} added".replace("_", " ") for row in rows]
    with pyplot_without_window() as pyplot:
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
