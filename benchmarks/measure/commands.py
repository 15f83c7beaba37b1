"""Seconds and peak memory of the commands that one waits for.

python benchmarks/measure/commands.py                      demo and evaluate on the shipped model, and results/demo.json
python benchmarks/measure/commands.py --inspect NAME=DIR   inspect on a model's folder, alone and with --neighbours
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


def bench(name: str, arguments: list[str], model: str = "shipped model", dtype: str = "float32") -> None:
    """Runs the command line in a process of its own and records what it took."""
    command = [str(Path(sys.executable).with_name("thought-kernels")), *arguments]
    started = time.perf_counter()
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(command)} must succeed, got exit status {os.waitstatus_to_exitcode(status)}")
    peak = usage.ru_maxrss / 2**10
    case = harness.Case("command", model, name, dtype)
    harness.record(
        [
            harness.row(case, f"thought-kernels {name}", "wall time", seconds, "s", "cpu"),
            harness.row(case, f"thought-kernels {name}", "peak memory", peak, "MiB", "cpu"),
        ],
        "cpu",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inspect", metavar="NAME=DIR", help="measure inspect on this model instead")
    given = parser.parse_args().inspect
    with tempfile.TemporaryDirectory() as folder:
        if given is not None:
            model, _, place = given.partition("=")
            if not Path(place).is_dir():
                raise SystemExit(f"--inspect must be NAME=DIR with a folder that exists, got {given}")
            bench("inspect", ["inspect", place], model, "as stored")
            bench(
                "inspect --neighbours",
                ["inspect", place, "--neighbours", str(Path(folder, "n.json"))],
                model,
                "as stored",
            )
            return
        bench("demo", ["demo", "--json", str(DEMO), "--output", str(Path(folder, "demo.png"))])
        bench("evaluate", ["evaluate", "--task", "multiply", "--output", folder])


if __name__ == "__main__":
    main()
