"""The tables of docs/gpu.md: what is predicted of a GPU, what it measured once it has, and launches of a fit."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

from markdown_table import markdown

RESULTS = Path(__file__).resolve().parents[1] / "results"
PREDICTED, MEASURED = RESULTS / "predicted-nvidia-h200.csv", RESULTS / "nvidia-h200.csv"
LAUNCHES = RESULTS / "launches.csv"
KEY = ("op", "measure", "case", "provider", "shape", "dtype")
SHOWN = {  # op and measure, and the providers that are shown; how many shapes of each
    ("fit", "time"): ("fit", "fit, without solving", "one forward with context, cached prefix"),
    ("transmute", "time per example"): ("layerwise",),
    ("accumulate", "time"): ("accumulate (cuda)", "accumulate (triton)"),
    ("paired_attention", "time"): ("paired_attention (triton)", "flash on own keys and on the prefix, merged"),
    ("rms_norm_pair", "time"): ("rms_norm_pair (cuda)",),
}
SHAPES = {  # of kernels: one for each width, head_dim and group
    "accumulate": ("16384 x 640", "16384 x 1152", "16384 x 2560"),
    "paired_attention": (
        "2x8/4 T1024 P256 D256", "2x9/3 T1024 P256 D64", "2x14/2 T1024 P256 D64", "2x32/8 T1024 P256 D128",
        "2x64/8 T1024 P256 D128",
    ),
    "rms_norm_pair": ("16384 x 640", "16384 x 2560"),
}  # fmt: skip
WINDOWS = "window of "
Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """Rows of a results file, none where it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def key(row: Row) -> tuple[str, ...]:
    """As predict.py joins rows."""
    return tuple(row[name].removesuffix(", eager") for name in KEY)


def shown(rows: list[Row]) -> Iterator[Row]:
    """The predicted rows that the table has, in its order."""
    for (op, measure), providers in SHOWN.items():
        of_op = [row for row in rows if (row["op"], row["measure"], row["dtype"]) == (op, measure, "bfloat16")]
        shapes = SHAPES.get(op, tuple(dict.fromkeys(row["shape"] for row in of_op)))
        for shape in shapes:
            for provider in providers:
                yield from (
                    row
                    for row in of_op
                    if (row["shape"], row["provider"]) == (shape, provider) and not row["case"].startswith(WINDOWS)
                )


def predicted() -> str:
    """Predicted milliseconds, and the measured ones beside them."""
    measured = {key(row): row for row in read(MEASURED)}
    lines = []
    for row in shown(read(PREDICTED)):
        found = measured.get(key(row))
        cells = ("not measured", "–")
        if found is not None:
            cells = (f"{milliseconds(found):.3g}", f"{milliseconds(found) / milliseconds(row):.2f}")
        by = f"{row['provider']}, one example" if row["measure"] == "time per example" else row["provider"]
        lines.append((f"`{row['op']}`", row["shape"], by, f"{milliseconds(row):.3g}", *cells))
    return markdown(("what", "shape", "by", "predicted, ms", "measured, ms", "measured / predicted"), lines)


def milliseconds(row: Row) -> float:
    return float(row["value"]) * {"s": 1e3, "ms": 1.0}[row["unit"]]


def launches() -> str:
    """Of one block: kernels, waits, and what they take beside the kernels' own time."""
    lines = [
        (
            f"Gemma 3 {row['model'].replace('b', 'B').replace('m', 'M')}", row["part"],
            f"{float(row['launches']):.0f}", f"{float(row['waits']):.0f}",
            *(f"{float(row[name]):,.0f}" for name in ("roofline_us", "launch_us", "wait_us")),
        )
        for row in read(LAUNCHES)
    ]  # fmt: skip
    head = ("model", "in one block", "launches", "waits", "kernels, µs", "launches, µs", "waits, µs")
    return markdown(head, lines)


GPU: dict[str, Callable[[], str]] = {"gpu predicted": predicted, "gpu launches": launches}
