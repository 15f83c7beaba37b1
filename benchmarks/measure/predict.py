"""What a GPU round should find, by a roofline of its kernels: a predicted time for every row, written before any is
measured.

python benchmarks/measure/predict.py            writes results/predicted-nvidia-h200.csv

The sections of device_sections.py run as they are on tensors without data (counted.py), with a clock that advances by
max(bytes / bandwidth, FLOPs / peak) of each kernel and by what its launch takes (roofline.py, machine.py). So rows have
the keys of those that a GPU will write. Kernels are taken to run one after the other, and never while the host is busy;
kernels too small to fill the GPU are taken to reach what large ones do; what Python does between launches is left out.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import harness
from counted import counting
from device_section import Section
from device_sections import SECTIONS
from harness import Case, Provider
from machine import H200, Machine
from roofline import Work
from torch import Tensor

from thought_kernels.ops import library

ROOT = Path(__file__).resolve().parents[2]
KEY = tuple(name for name in harness.KEY if name != "threads")  # a GPU's host has as many as it has
COLUMNS = (*KEY, "value", "unit", "bytes", "flops", "launches")
Row = dict[str, Any]


class Predicted(Section):
    """A section whose times are a roofline's.

    Attributes:
        stands_for: the device whose backends are predicted.
        work: all that was counted so far.
        rows: predicted so far.
    """

    def __init__(self, work: Work, stands_for: str = "cuda", tiny: bool = False) -> None:
        super().__init__("meta", tiny, math.inf)
        self.warm, self.rounds, self.stands_for, self.work = 0, 1, stands_for, work
        self.rows: list[Row] = []

    def clock(self) -> float:
        """As far as the roofline has come."""
        return self.work.seconds()

    def record(self, rows: list[dict]) -> None:
        """Keeps rows."""
        self.rows += [{name: line.get(name, "") for name in COLUMNS} for line in rows]

    def passes(self, what: str, check: Callable[[], Any]) -> bool:
        """There are no numbers to check."""
        return True

    def backends(self, operator: str) -> list[str]:
        """Those that are written, whether or not this machine can run them."""
        if self.stands_for == "cpu":
            return ["cpp"]
        stem = library.OPERATORS[operator].stem
        sources = {"triton": f"thought_kernels/triton/{stem}.py", "cuda": f"csrc/cuda/{stem}.cu"}
        return [name for name, source in sources.items() if (ROOT / source).is_file()]

    def measure(
        self, case: Case, candidates: list[Provider], truth: dict[str, Tensor], plain: dict[str, Tensor]
    ) -> list[dict]:
        """Each candidate as a CUDA graph."""
        rows = []
        for candidate in candidates:
            before = self.work.copy()
            candidate.run()
            work = self.work.since(before)
            row = harness.row(case, candidate.name, "time", 1e3 * work.seconds(replayed=True), "ms", self.device)
            flops = sum(work.flops.values())
            rows.append(
                {**row, "bytes": f"{work.bytes:.4g}", "flops": f"{flops:.4g}", "launches": f"{work.launches:.0f}"}
            )
        self.record(rows)
        return rows


def predict(machine: Machine, stands_for: str = "cuda", *, tiny: bool = False) -> list[Row]:
    """A row for each that device_sections.py writes, by its key.

    Raises:
        RuntimeError: a section that cannot be predicted.
    """
    rows: dict[tuple[str, ...], Row] = {}
    for name, run in SECTIONS.items():
        with counting(machine) as work:
            section = Predicted(work, stands_for, tiny)
            run(section)
        if section.wrong or not section.rows:
            raise RuntimeError(f"predict: section {name} must run without data, got {section.wrong} failures")
        rows |= {key(row): row for row in section.rows}
    return [rows[found] for found in sorted(rows)]


def key(row: Mapping[str, str]) -> tuple[str, ...]:
    """By what a measured row is joined with a predicted one; a run that no CUDA graph could hold says so by a word."""
    return tuple(row[name].removesuffix(", eager") for name in KEY)


def write(path: Path, columns: tuple[str, ...], rows: list[Row]) -> None:
    """Rows as csv."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write(harness.RESULTS / f"predicted-{H200.name}.csv", COLUMNS, predict(H200))


if __name__ == "__main__":
    main()
