"""Runs the experiment commands on the shipped model; write_tables.py then makes their page's tables anew.

    python benchmarks/measure/experiments.py [--only addition,composition]

Results go to benchmarks/results/experiments/NAME. An experiment that was stopped goes on from its journal, which is
removed when it is finished. `make experiments` does all, and interference.py too.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from thought_kernels.cli import app

RESULTS = Path(__file__).resolve().parents[1] / "results"
NAMES = ("addition", "multiplication", "translation", "composition", "knowledge")


def run(name: str) -> None:
    """One experiment; its journal stays only if it does not finish."""
    folder, start = RESULTS / "experiments" / name, time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    code = app(["experiment", name, "--output", str(folder)], standalone_mode=False)
    if code:
        sys.exit(code)
    (folder / "journal.jsonl").unlink(missing_ok=True)
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(NAMES))
    names = parser.parse_args().only.split(",")
    unknown = set(names) - set(NAMES)
    if unknown:
        parser.error(f"--only must be among {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    for name in names:
        run(name)


if __name__ == "__main__":
    main()
