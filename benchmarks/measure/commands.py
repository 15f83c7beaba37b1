"""Seconds and peak memory of the two commands that a newcomer waits for, on the shipped model.

python benchmarks/measure/commands.py     also writes results/demo.json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

DEMO = harness.RESULTS / "demo.json"


def bench(name: str, arguments: list[str]) -> None:
    """Runs the command line in a process of its own and records what it took."""
    command = [str(Path(sys.executable).with_name("thought-kernels")), *arguments]
    started = time.perf_counter()
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(command)} must succeed, got exit status {os.waitstatus_to_exitcode(status)}")
    peak = usage.ru_maxrss / 2**10
    case = harness.Case("command", "shipped model", name, "float32")
    harness.record(
        [
            harness.row(case, f"thought-kernels {name}", "wall time", seconds, "s", "cpu"),
            harness.row(case, f"thought-kernels {name}", "peak memory", peak, "MiB", "cpu"),
        ],
        "cpu",
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench("demo", ["demo", "--json", str(DEMO), "--output", str(Path(folder, "demo.png"))])
        bench("evaluate", ["evaluate", "--task", "multiply", "--output", folder])


if __name__ == "__main__":
    main()
