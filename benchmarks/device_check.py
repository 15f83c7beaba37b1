"""Everything a machine with a GPU is needed for, in one command of under eight minutes.

python benchmarks/device_check.py --output DIR      build, test and time; DIR defaults to $OUT, else benchmarks/results
python benchmarks/device_check.py --dry-run         only lists the steps
python benchmarks/device_check.py --device cpu --output DIR    all timing code at sizes of a few elements

Each step is a process of its own, so that a crash on the device costs that step alone. DIR receives summary.json
(device, versions, outcome and seconds of each step), steps.log and the results file of the device, <device>.csv, to be
put beside those of benchmarks/results. A provider that is wrong is reported and not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BUDGET = 460.0  # seconds for all steps together


class Step(NamedTuple):
    """One process.

    Attributes:
        name: shown in the log and the summary.
        command: what is run, in the repository's root.
        limit: seconds it may take.
    """

    name: str
    command: list[str]
    limit: float


def steps(output: Path, device: str = "cuda") -> list[Step]:
    """All steps, those first whose figures matter most; on a CPU the sections alone, at sizes of a few elements."""
    python, tests = sys.executable, [sys.executable, "-m", "pytest", "-q"]
    sections = [
        python,
        str(ROOT / "benchmarks" / "measure" / "device_sections.py"),
        "--device",
        device,
        "--output",
        str(output),
    ]
    if device == "cpu":
        return [Step("sections", [*sections, "--tiny", "--seconds", "400", "all"], BUDGET)]
    build = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."]

    def timed(name: str, seconds: float) -> Step:
        return Step(f"bench-{name}", [*sections, "--seconds", str(seconds), name], 1.5 * seconds + 15)

    return [  # a section checks what it times, so the tests need not come first
        Step("build", build, 180),
        timed("fit-270m", 25),
        timed("attention", 60),
        timed("fit-4b", 25),
        timed("accumulate", 40),
        Step("test-accumulate", [*tests, "-k", "cuda or triton", "tests/test_accumulate.py"], 100),
        timed("fit-1b", 15),
        Step("test-attention", [*tests, "tests/test_attention_triton.py", "tests/test_delta_accuracy.py"], 100),
        timed("norms", 10),
        timed("transmute-1b", 30),
        Step("test-triton", [*tests, "tests/test_accumulate_triton.py"], 60),
        timed("transmute-4b", 30),
        Step("test-low-rank", [*tests, "-k", "triton", "tests/test_gathered_low_rank.py"], 60),
    ]


def describe() -> dict[str, object]:
    """The device and the versions that the figures belong to."""
    import torch

    cuda = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if cuda else None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    smi = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"]
    found = shutil.which("nvidia-smi")
    return {
        "device": properties.name if properties else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "memory_gib": round(properties.total_memory / 2**30, 1) if properties else None,
        "nvidia_smi": subprocess.run(smi, capture_output=True, text=True).stdout.strip() if found else None,
        **versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def run_all(output: Path, device: str) -> int:
    output.mkdir(parents=True, exist_ok=True)
    log = output / "steps.log"
    log.unlink(missing_ok=True)
    summary: dict[str, object] = {**describe(), "steps": {}}
    outcomes: dict[str, dict[str, object]] = {}
    began = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for step in steps(output, device):
        limit = min(step.limit, BUDGET - (time.monotonic() - began))
        started = time.monotonic()
        if limit < 5:
            outcome = "not started: no time left"
        else:
            with log.open("a") as file:
                file.write(f"\n==== {step.name}: {' '.join(step.command)}\n")
                file.flush()
                try:
                    code = subprocess.run(
                        step.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit
                    ).returncode
                    outcome = "passed" if code == 0 else f"failed with exit status {code}"
                except subprocess.TimeoutExpired:
                    outcome = f"stopped after {limit:.0f} s"
            print(log.read_text()[-1000:])
        outcomes[step.name] = {"outcome": outcome, "seconds": round(time.monotonic() - started, 1)}
        print(f"{step.name}: {outcome} ({outcomes[step.name]['seconds']} s)", flush=True)
        summary["steps"] = outcomes
        (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return sum(outcome["outcome"] != "passed" for outcome in outcomes.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT") or RESULTS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="list the steps and stop")
    options = parser.parse_args()
    if options.dry_run:
        for step in steps(options.output, options.device):
            print(f"{step.name:24} at most {step.limit:3.0f} s  {' '.join(step.command)}")
        return 0
    if options.device == "cuda" and describe()["device"] is None:
        raise SystemExit("device_check: torch must see a CUDA device, got none; --device cpu runs the code without one")
    if options.device == "cpu" and options.output.resolve() == RESULTS.resolve():
        raise SystemExit("device_check: --output must be given with --device cpu, whose figures mean nothing")
    return run_all(options.output.resolve(), options.device)


if __name__ == "__main__":
    sys.exit(main())
