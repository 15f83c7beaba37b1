"""The tables of the README and of docs/, and pictures, made from the committed results.

python benchmarks/tables/write_tables.py            rewrites the tables where they stand, and the pictures
python benchmarks/tables/write_tables.py --check    exits with 1, and says where, if one differs from its results

A table stands between `<!-- table: NAME -->` and `<!-- end of NAME -->`.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import real_picture
import strata_picture
from compilation_tables import COMPILATION
from cpu_tables import CPU_TABLES
from demo_tables import DEMO
from experiment_tables import EXPERIMENTS
from foretell_tables import FORETELL
from gpu_tables import GPU
from growth_tables import GROWTH
from inspect_tables import INSPECT
from pareto_tables import PARETO
from published_tables import PUBLISHED
from real_tables import REAL
from scaling_tables import SCALING
from serving_tables import SERVING
from toy_pictures import TOY_PICTURES
from toy_tables import TOY
from whole_call_tables import WHOLE_CALL

from thought_kernels.evaluation.records.files import write_text

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (
    "README.md",
    "docs/demo.md",
    "docs/speed.md",
    "docs/gpu.md",
    "docs/recipes.md",
    "docs/theory.md",
    "docs/toy_models.md",
    "docs/experiments.md",
    "docs/experiments_real.md",
    "docs/spectral_models.md",
    "docs/real_models.md",
    "docs/compilation.md",
    "docs/serving.md",
    "docs/report.md",
)


TABLES: dict[str, Callable[[], str]] = {
    **DEMO,
    **CPU_TABLES,
    **EXPERIMENTS,
    **PUBLISHED,
    **REAL,
    **COMPILATION,
    **SERVING,
    **PARETO,
    **SCALING,
    **GROWTH,
    **GPU,
    **TOY,
    **INSPECT,
    **FORETELL,
    **WHOLE_CALL,
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
    pictures = [(picture.PICTURE, picture) for picture in (real_picture, strata_picture)]
    for drawn, picture in [*pictures, *((picture.path, picture) for picture in TOY_PICTURES)]:
        if not picture.is_current():
            print(drawn.relative_to(ROOT), "differs from the results" if options.check else "")
            if options.check:
                differs = True
            else:
                picture.draw()
    sys.exit(differs)


if __name__ == "__main__":
    main()
