"""The tables of the README and of docs/ that show measured numbers, written from the committed results.

python benchmarks/tables/write_tables.py            rewrites the tables where they stand
python benchmarks/tables/write_tables.py --check    exits with 1, and says where, if one differs from its results

A table stands between `<!-- table: NAME -->` and `<!-- end of NAME -->`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpu_tables import CPU_TABLES
from experiment_tables import EXPERIMENTS
from markdown_table import markdown
from real_tables import REAL

from thought_kernels.evaluation.records.files import write_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    "README.md",
    "docs/recipes.md",
    "docs/theory.md",
    "docs/toy_models.md",
    "docs/experiments.md",
    "docs/spectral_models.md",
    "docs/real_models.md",
)


def demo() -> str:
    """Accuracy and recovered effect of the demonstration."""
    head = ("instruction", "bare", "prompted", "patched", "recovered", "of values", "outside: prompted", "patched")
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


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    **CPU_TABLES,
    **EXPERIMENTS,
    **REAL,
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
