"""The tables of the README and of docs/ that show measured numbers, written from the committed results.

python benchmarks/tables.py            rewrites the tables where they stand
python benchmarks/tables.py --check    exits with 1, and says where, if one differs from its results

A table stands between `<!-- table: NAME -->` and `<!-- end of NAME -->`.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiment_tables import EXPERIMENTS
from markdown_table import markdown

from thought_kernels.evaluate.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CPU = "amd-epyc-2-cores.csv"
DOCUMENTS = ("README.md", "docs/toy_models.md", "docs/experiments.md", "docs/spectral_models.md")

Row = dict[str, str]


def results(name: str) -> list[Row]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def found(rows: Iterable[Row], **fields: str) -> list[Row]:
    """The rows whose fields begin with the given texts; a text that ends with a full stop must be the whole."""

    def matches(value: str, wanted: str) -> bool:
        return value == wanted[:-1] if wanted.endswith(".") else value.startswith(wanted)

    return [row for row in rows if all(matches(row[key], wanted) for key, wanted in fields.items())]


def one(rows: Iterable[Row], **fields: str) -> Row:
    chosen = found(rows, **fields)
    if len(chosen) != 1:
        raise SystemExit(f"tables: {len(chosen)} rows have {fields}, not one")
    return chosen[0]


def demo() -> str:
    """Accuracy and recovered effect of the demonstration."""
    head = (
        "instruction",
        "bare",
        "prompted",
        "patched",
        "recovered",
        "of values alone",
        "outside: prompted",
        "patched",
    )
    tasks: list[dict[str, Any]] = json.loads((RESULTS / "demo.json").read_text())
    return markdown(
        head,
        [
            (
                task["instruction"] + (r" \*" if task["reserved"] else ""),
                *(f"{task[key]:.3f}" for key in ("base", "prompted", "patched")),
                f"{task['recovered']:.4f}",
                f"{task['recovered_values']:.3f}",
                *(f"{task[key]:.3f}" for key in ("prompted_outside", "patched_outside")),
            )
            for task in tasks
        ],
    )


def speed() -> str:
    """What this project's kernels take beside others on a CPU."""
    rows = results(CPU)
    lines: list[tuple[str, str, str]] = []

    def accumulate(provider: str, rows_and_width: str, **fields: str) -> float:
        return float(
            one(rows, op="accumulate", provider=provider, shape=rows_and_width, measure="time", **fields)["ratio"]
        )

    widths = (640, 1152)
    full = {"case": "cross + gram + sums", "dtype": "float32"}
    ratios = [accumulate("accumulate (cpp).", f"16384 x {d}.", threads="2.", **full) for d in widths]
    what = "`accumulate`: cross, Gram, sums, weights and norms of 16,384 rows, d = 640 and 1152"
    lines.append((what, "two bare `addmm_` on scaled inputs", both(ratios, "{:.2f} x their time")))
    for provider, text in (
        ("equal work per token, H +=", "the same work per token, `H += w * outer(delta, a) / norm`, one thread"),
        ("equal work per token, weights", "the same with the weight in the vector, `H += outer(w / norm * delta, a)`"),
    ):
        ratios = [accumulate(provider, f"4096 x {d}.", threads="1.", **full) for d in widths]
        lines.append((what, text, both(ratios, "{:.0f} x faster")))
    ratios = [
        accumulate("H += outer(delta, a) per token", f"4096 x {d}.", threads="1.", case="cross alone") for d in widths
    ]
    lines.append(
        ("its cross product alone", "`H += outer(delta, a)` per token, one thread", both(ratios, "{:.0f} x faster"))
    )

    attention = found(rows, op="paired_attention", measure="time.", provider="paired_attention (cpp)")
    ratios = [float(row["ratio"]) for row in attention]
    text = f"{statistics.median(ratios):.2f} x its time (median of {len(ratios)}; worst {max(ratios):.2f})"
    lines.append(("`paired_attention`: both outputs", "torch's flash attention for one of them", text))

    width = one(
        rows,
        op="spectral",
        measure="time.",
        provider="fractional_dimensionality",
        shape="1152 x 262144",
        case="fractional dimensionality.",
    )
    lines.append(
        (
            "`fractional_dimensionality`, 262,144 features x 1152",
            "one Gram product",
            f"{float(width['ratio']):.2f} x its time",
        )
    )
    return markdown(("what", "against", "result"), lines)


def runs() -> str:
    """A whole `transmute` beside hooks on transformers' own forwards."""
    rows = found(results(CPU), op="transmute", measure="time per example")
    shapes = {"270M, P = 32": "270m P32", "270M, P = 256": "270m P256", "1B, P = 32": "1b P32"}
    peers = {
        "hooks on two forwards per example": "two forwards, hooks, one by one",
        "the same in batches of 8": "two forwards, hooks, batches",
        "prefixes cached, no head, hooks": "prefix cached and repeated, no head, hooks.",
        "the same with oneDNN's products, as ours": "prefix cached and repeated, no head, hooks, oneDNN",
        "`sequential`": "sequential",
        "`two_pass`": "two_pass",
        "one forward of the examples over a cached prefix": "one forward",
    }
    lines = []
    for text, provider in peers.items():
        cells = [found(rows, shape=shape, provider=provider) for shape in shapes.values()]
        lines.append((text, *(f"{float(cell[0]['ratio']):.2f}" if cell else "" for cell in cells)))
    return markdown(("time, `layerwise` = 1", *shapes), lines)


def both(ratios: Sequence[float], text: str) -> str:
    number = re.search(r"\{.*?\}", text)
    assert number is not None
    return text.replace(number[0], " and ".join(number[0].format(ratio) for ratio in ratios))


def toy_speed() -> str:
    """Ten steps of 32 toy models."""
    rows = results(CPU)
    lines = []
    for m in (16, 64):
        of = {
            key: float(one(rows, op="toy", measure="time.", provider=key, shape=f"32 x {m} ")["value"])
            for key in ("one by one, autograd", "one by one, closed form", "all at once")
        }
        autograd, closed, batch = of.values()
        lines.append(
            (
                f"m = {m}",
                f"{autograd:.1f} ms",
                f"{closed:.1f} ms",
                f"{batch:.1f} ms",
                f"{autograd / batch:.1f}",
                f"{closed / batch:.1f}",
            )
        )
    head = (
        "32 models",
        "one by one, autograd",
        "one by one, closed form",
        "all at once",
        "times the first",
        "times the second",
    )
    return markdown(head, lines)


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "speed": speed,
    "runs": runs,
    "toy speed": toy_speed,
    **EXPERIMENTS,
}


def with_tables(text: str) -> str:
    """The document with every table made anew."""

    def table(match: re.Match[str]) -> str:
        return f"{match['begin']}\n{TABLES[match['name']]()}\n{match['end']}"

    return re.sub(
        r"(?P<begin><!-- table: (?P<name>[\w ]+) -->)\n.*?(?P<end><!-- end of (?P=name) -->)",
        table,
        text,
        flags=re.DOTALL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    differs = False
    for name in DOCUMENTS:
        path = ROOT / name
        old = path.read_text()
        new = with_tables(old)
        if options.check:
            changes = list(
                difflib.unified_diff(old.splitlines(), new.splitlines(), name, "from the results", lineterm="")
            )
            print(*changes, sep="\n", end="\n" if changes else "")
            differs = differs or bool(changes)
        elif new != old:
            write_text(new, path)
            print(name)
    sys.exit(differs)


if __name__ == "__main__":
    main()
