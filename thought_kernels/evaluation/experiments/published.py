"""What the paper did in each of its experiments, and the lines that are drawn of them."""

from __future__ import annotations

from dataclasses import dataclass

LINES = ("paper", "tuned", "default")


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


PUBLISHED = {
    "addition": Published("Sum the numbers", 0.015, 0.0, "TP Figure 1 (left) and Table 1", (0, 280, 600)),
    "multiplication": Published("Multiply the numbers", 0.015, 0.0, "TP Figure 1 (right) and Table 2", (370, 460, 600)),
    "translation": Published("Translate to French", 0.03, 0.2, "TP Figure 2 and Table 3", (180, 240)),
}
