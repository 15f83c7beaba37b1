"""The table of docs/speed.md of whole calls on a real model, from the rows of real/whole_call.py."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from markdown_table import markdown

RESULTS = Path(__file__).resolve().parents[1] / "results" / "whole_call.csv"


def whole_call() -> str:
    """Each way's median seconds with the fastest and the slowest, its time over its peer's, and what it recovers."""
    if not RESULTS.exists():
        return "Not measured yet."
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [
        (
            row["way"], f"{seconds(row['seconds'])} ({seconds(row['low'])} to {seconds(row['high'])})",
            "–" if row["way"] == row["peer"] else f"{float(row['ratio']):.2f} x {row['peer']}",
            f"{float(row['recovered']):.3f}" if row["recovered"] else "–",
        )
        for row in rows
    ]  # fmt: skip
    return markdown(("what", "seconds", "its time over that of", "recovered"), lines)


def seconds(text: str) -> str:
    return f"{float(text):.3g}"


WHOLE_CALL: dict[str, Callable[[], str]] = {"whole call": whole_call}
