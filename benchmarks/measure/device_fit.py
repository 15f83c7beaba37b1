"""The default fit on a device at Gemma 3's shapes, solving included, beside one forward of its rows."""

from __future__ import annotations

import bench_fit
import torch
from bench_fit import Task
from bench_transmute import IDS, build
from device_section import Section
from harness import Case

# (tokens of the prefix, tokens of a row, rows)
CASES = {
    "270m": [(32, 32, 32), (32, 55, 128), (256, 32, 32)],
    "1b": [(32, 32, 32), (256, 32, 32)],
    "4b": [(32, 32, 32), (256, 32, 32)],
}
TINY = [(8, 4, 2)]


def default_fit(section: Section, name: str) -> None:
    """Whole fits in bfloat16 with random weights, after a check in float32 on a model of two blocks."""
    cases = list(section.cases(CASES[name], TINY))
    shape, blocks = ("270m", 2) if section.tiny else (name, None)
    check = lambda: bench_fit.check(shape, cases[0], section.device)  # noqa: E731
    if not cases or not section.passes(f"check of the default fit at the {name} shape", check):
        return
    with torch.device(section.device):
        model = build(shape, blocks, IDS).to(torch.bfloat16)
    for numbers in section.cases(cases, cases):
        measured = lambda numbers=numbers: fit_case(section, name, Task(model, numbers), numbers)  # noqa: E731
        section.attempt(f"the default fit at the {name} shape, {numbers}", measured)


@torch.no_grad()
def fit_case(section: Section, name: str, task: Task, numbers: tuple[int, int, int]) -> None:
    prefix, length, rows = numbers
    case = Case(
        "fit", f"attention and down, {len(task.decoder.blocks)} blocks, {rows} rows", f"{name} P{prefix} n{length}",
        "bfloat16",
    )  # fmt: skip
    for _ in range(section.warm):  # compiles kernels
        task.fit()
    times = bench_fit.time_parts(task, section.clock, section.rounds)
    section.record(bench_fit.time_rows(case, "time", times, section.device))
