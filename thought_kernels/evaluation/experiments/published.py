"""What the paper did in each of its experiments, and the lines that are drawn of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from thought_kernels.fitting.recipe import Recipe, paper_recipe

LINES = ("paper", "tuned", "residual", "default")
READINGS = {"paper": "input", "tuned": "input", "residual": "residual"}  # mlp_activation of the paper's recipe
CHOSEN = ("tuned", "residual")  # lines whose c1 is chosen on the model


def check_lines(lines: Sequence[str]) -> None:
    """Raises ValueError for no line, or an unknown one."""
    if not lines or not set(lines) <= set(LINES):
        raise ValueError(f"experiment: lines must be among {', '.join(LINES)}, got {list(lines)}")


@dataclass(frozen=True)
class Published:
    """What the paper did in one experiment.

    Attributes:
        instruction: transmuted.
        c1, c2: scales of matrices and vectors.
        source: figure and table.
        sampled: steps whose answers the table shows.
    """

    instruction: str
    c1: float
    c2: float
    source: str
    sampled: tuple[int, ...]

    def constants(self, c1: float | None, c2: float | None) -> tuple[float, float]:
        """c1 and c2, the published ones in place of None."""
        return self.c1 if c1 is None else c1, self.c2 if c2 is None else c2

    def recipe(self, c1: float | None = None, c2: float | None = None, layers: Iterable[int] | None = None) -> Recipe:
        """Algorithm 1 with these constants and blocks, None for the published ones and for all; raises as it does."""
        matrices, vectors = self.constants(c1, c2)
        return paper_recipe(c1=matrices, c2=vectors, layers=layers)


PUBLISHED = {
    "addition": Published("Sum the numbers", 0.015, 0.0, "TP Figure 1 (left) and Table 1", (0, 280, 600)),
    "multiplication": Published("Multiply the numbers", 0.015, 0.0, "TP Figure 1 (right) and Table 2", (370, 460, 600)),
    "translation": Published("Translate to French", 0.03, 0.2, "TP Figure 2 and Table 3", (180, 240)),
}
