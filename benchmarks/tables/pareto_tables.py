"""The table of effect against drift, from the rows of real/pareto.py."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from markdown_table import markdown
from real_tables import MODELS

RESULTS = Path(__file__).resolve().parents[1] / "results" / "pareto.csv"
KNOBS = {"scale": "scale λ", "ridge": "ridge ε", "text_weight": "text_weight γ"}


def pareto() -> str:
    """A row for each setting of each knob, models beside each other; recovered effect and KL on ordinary text."""
    with RESULTS.open(newline="") as file:
        every = list(csv.DictReader(file))
    rows, heads = [], ["knob", "value"]
    models = [model for model in MODELS if any(row["model"] == model for row in every)]
    for model in models:
        own = [row for row in every if row["model"] == model]
        most = max(_size(row) for row in own)  # of several runs the largest
        rows += [row for row in own if _size(row) == most]
        heads += [f"{MODELS[model]}, {own[-1]['task']}, {most[0]} inputs: recovered", "text KL", "perplexity"]
    found = {(row["model"], row["knob"], float(row["value"])): row for row in rows}
    lines = []
    for knob, value in sorted({key[1:] for key in found}, key=lambda key: (list(KNOBS).index(key[0]), key[1])):
        line = [KNOBS[knob], f"{value:g}"]
        for model in models:
            row = found.get((model, knob, value))
            figures = {"recovered": 3, "text_kl": 3, "text_perplexity": 1}
            line += ["–" if row is None else f"{float(row[name]):.{digits}f}" for name, digits in figures.items()]
        lines.append(line)
    bare = ["none (bare)", "–"]
    for model in models:
        bare += ["0", "0", next(f"{float(row['bare_perplexity']):.1f}" for row in rows if row["model"] == model)]
    return markdown(heads, [bare, *lines])


def _size(row: dict[str, str]) -> tuple[int, int]:
    return int(row["inputs"]), int(row["written"])


PARETO: dict[str, Callable[[], str]] = {"effect against drift": pareto}
