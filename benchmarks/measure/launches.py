"""How many kernels a block of the default fit launches, and what they would take if launches took nothing.

python benchmarks/measure/launches.py           writes results/launches.csv; needs no GPU and no data

Counted as counted.py does, at Gemma 3's shapes in bfloat16, a prefix of 32 tokens: one forward over the cached prefix
of a batch of 32 rows of 32 tokens, the fit of these rows without solving, and solving; and what a further batch, of 32
rows of 55, adds to a fit of four. All of it is of one block: what a model of four blocks has more than one of three.
"""

from __future__ import annotations

import argparse
from functools import reduce
from typing import Any
from unittest import mock

import harness
import torch
from bench_fit import BATCH, Task
from bench_transmute import IDS, build
from counted import counting
from machine import H200
from predict import Row, write
from roofline import Work

from thought_kernels.estimation.accumulator import ThoughtAccumulator

MODELS = ("270m", "1b", "4b")
PREFIX, BATCHES = 32, 4
COLUMNS = (
    "model", "part", "launches", "waits", "megabytes", "bfloat16_gflops", "float32_gflops", "float64_gflops",
    "roofline_us", "launch_us", "wait_us",
)  # fmt: skip


@torch.no_grad()
def count(name: str, length: int, batches: int, blocks: int) -> dict[str, Work]:
    """The work of one forward of so many batches, of a fit without solving, and of solving."""
    solved: list[Work] = []
    solve_part = ThoughtAccumulator.solve_part
    with counting(H200) as work:
        with torch.device("meta"):
            model = build(name, blocks, IDS).to(torch.bfloat16)
        task = Task(model, (PREFIX, length, BATCH * batches))

        def solve(*args: Any, **options: Any) -> Any:
            before = work.copy()
            patch = solve_part(*args, **options)
            solved.append(work.since(before))
            return patch

        before = work.copy()
        task.forward()
        forward, before = work.since(before), work.copy()
        with mock.patch.object(ThoughtAccumulator, "solve_part", solve):
            task.fit()
        solving = reduce(Work.plus, solved)
        return {"forward": forward, "fit, without solving": work.since(before).since(solving), "solving": solving}


def parts(name: str) -> dict[str, Work]:
    """Of one block: the parts of one batch, and what a further one adds to the fit."""
    one, few, more = (of_a_block(name, *sizes) for sizes in ((32, 1), (55, BATCHES), (55, BATCHES + 1)))
    return {**one, "fit, a further batch": more["fit, without solving"].since(few["fit, without solving"])}


def of_a_block(name: str, length: int, batches: int) -> dict[str, Work]:
    """What one block more adds; a model's first and last block have a little more and less to do."""
    fewer, more = (count(name, length, batches, blocks) for blocks in (3, 4))
    return {part: work.since(fewer[part]) for part, work in more.items()}


def row(name: str, part: str, work: Work) -> Row:
    """A part's line of the results."""
    gflops = {f"{path}_gflops": work.flops.get(path, 0.0) / 1e9 for path in ("bfloat16", "float32", "float64")}
    figures = {
        "launches": work.launches, "waits": work.waits, "megabytes": work.bytes / 1e6, **gflops,
        "roofline_us": 1e6 * work.device, "launch_us": 1e6 * work.launches * H200.launch,
        "wait_us": 1e6 * work.waits * H200.wait,
    }  # fmt: skip
    return {"model": name, "part": part, **{key: f"{value:.1f}" for key, value in figures.items()}}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for name in MODELS:
        rows += [row(name, part, work) for part, work in parts(name).items()]
    write(harness.RESULTS / "launches.csv", COLUMNS, rows)


if __name__ == "__main__":
    main()
