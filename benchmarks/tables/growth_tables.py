"""The table of docs/speed.md on how a fit's time and memory grow, from the rows of measure/bench_growth.py."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from markdown_table import markdown

RESULTS = Path(__file__).resolve().parents[1] / "results" / "growth.csv"
NAMES = {
    "examples": "examples", "length": "tokens of an example", "prompt": "tokens of the prompt",
    "hidden": "hidden size", "blocks": "blocks",
}  # fmt: skip


def growth() -> str:
    """A row for each axis: its ends, what a fit takes there, and the exponents of all points and of the last two."""
    with RESULTS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    last = rows[-1]["device"], rows[-1]["threads"]  # one machine's, that of the last measurement
    rows = [row for row in rows if (row["device"], row["threads"]) == last]
    lines = []
    for axis, name in NAMES.items():
        mine = sorted((row for row in rows if row["axis"] == axis), key=lambda row: int(row["value"]))
        if len(mine) < 2:
            continue
        values = [float(row["value"]) for row in mine]
        seconds, memory = ([float(row[column]) for row in mine] for column in ("seconds", "peak_mib"))
        lines.append((
            name, f"{values[0]:.0f} to {values[-1]:.0f}", f"{seconds[0]:.2g} to {seconds[-1]:.3g}",
            f"{slope(values, seconds):.2f}", f"{slope(values[-2:], seconds[-2:]):.2f}",
            f"{memory[0]:.0f} to {memory[-1]:.0f}", f"{slope(values[-2:], memory[-2:]):.2f}",
        ))  # fmt: skip
    head = ("what grows", "from, to", "seconds", "exponent", "at the end", "peak, MiB", "exponent at the end")
    return markdown(head, lines)


def slope(values: Sequence[float], costs: Sequence[float]) -> float:
    """k of cost = c value^k, by least squares of logarithms."""
    x, y = [math.log(value) for value in values], [math.log(cost) for cost in costs]
    middle = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - middle[0]) * (b - middle[1]) for a, b in zip(x, y, strict=True))
    return over / sum((a - middle[0]) ** 2 for a in x)


GROWTH: dict[str, Callable[[], str]] = {"growth": growth}
