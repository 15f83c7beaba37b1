"""The timings of a GPU round, one section a process: accumulate, attention, norms, transmute, the default fit.

python benchmarks/measure/device_sections.py attention --output DIR                one section
python benchmarks/measure/device_sections.py all --device cpu --tiny --output DIR  all, at sizes that mean nothing

A provider that fails or is wrong is reported, left out of the timing and counted in the exit status; the others go on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_accumulate
import harness
import torch
from device_attention import attention
from device_fit import default_fit
from device_section import Section
from harness import Case, Provider
from shapes import ACCUMULATE_GPU, GEMMA3
from torch import Tensor
from torch.nn.functional import rms_norm

import thought_kernels as tk

DTYPES = ("bfloat16", "float16", "float32")
NORMS = [(16384, model.hidden) for model in GEMMA3.values()]
PROMPTS = [(32, 32), (256, 32)]  # tokens of [H, I], and of e


def accumulate(section: Section) -> None:
    for dtype in DTYPES[:1] if section.tiny else DTYPES:
        for rows, d in section.cases(ACCUMULATE_GPU, [(64, 32)]):
            inputs = bench_accumulate.make_inputs(rows, d, getattr(torch, dtype), section.device)
            candidates = [bench_accumulate.two_products(inputs)]
            for backend in section.backends("accumulate"):
                run = lambda i, o, backend=backend: bench_accumulate.ours(i, o, backend)  # noqa: E731
                candidates.append(bench_accumulate.provider(f"accumulate ({backend})", run, inputs))
            candidates.append(bench_accumulate.provider("x.float().T @ x.float()", bench_accumulate.upcast, inputs))
            case = Case("accumulate", bench_accumulate.OUTPUTS, f"{rows} x {d}", dtype)
            section.measure(case, candidates, *bench_accumulate.truth_and_plain(inputs))


def norms(section: Section) -> None:
    for rows, d in section.cases(NORMS, [(16, 32)]):
        norms_case(section, rows, d)


def norms_case(section: Section, rows: int, d: int) -> None:
    x, weight = (torch.randn(*size, device=section.device).bfloat16() for size in ((rows, d), (d,)))
    delta = torch.randn(rows, d, device=section.device)

    def two(dtype: torch.dtype) -> dict[str, Tensor]:
        first = rms_norm(x.to(dtype), (d,), weight.to(dtype), 1e-6)
        return {"norm": first, "change": rms_norm(x.to(dtype) + delta.to(dtype), (d,), weight.to(dtype), 1e-6) - first}

    plain = two(torch.float32)
    plain["norm"] = plain["norm"].bfloat16()
    candidates = [
        Provider("two norms and their difference", lambda: two(torch.float32), lambda: two(torch.float32)),
        Provider("one norm", lambda: rms_norm(x, (d,), weight, 1e-6), dict),
    ]
    for backend in section.backends("rms_norm_pair"):
        run = lambda backend=backend: tk.rms_norm_pair(x, delta, weight, eps=1e-6, backend=backend)  # noqa: E731
        result = lambda run=run: dict(zip(("norm", "change"), run(), strict=True))  # noqa: E731
        candidates.append(Provider(f"rms_norm_pair ({backend})", run, result))
    case = Case("rms_norm_pair", "float32 delta", f"{rows} x {d}", "bfloat16")
    section.measure(case, candidates, two(torch.float64), plain)


def transmute(section: Section, name: str) -> None:
    """Whole runs in bfloat16 with random weights, after a check in float32 on a model of two blocks."""
    import bench_transmute

    def task(blocks: int | None, dtype: torch.dtype, prefix: int, length: int, examples: int, batch: int) -> Any:
        with torch.device(section.device):
            shape, words = ("270m", bench_transmute.IDS) if section.tiny else (name, bench_transmute.VOCABULARY)
            model = bench_transmute.build(shape, blocks, words)
        made = bench_transmute.Task(model.to(dtype), prefix, length, examples, batch)
        for part in ("header", "instruction", "tokens"):
            setattr(made, part, getattr(made, part).to(section.device))
        return made

    def check() -> None:
        small = task(2, torch.float32, *((6, 4) if section.tiny else (32, 16)), 2, 2)
        bench_transmute.check(Case("transmute", "check", name, "float32"), small, 2)

    if not section.passes(f"check of transmute at the {name} shape", check):
        return
    examples, batch, blocks = (2, 2, 2) if section.tiny else (64, 32, None)
    for prefix, length in section.cases(PROMPTS, [(6, 4)]):
        transmute_case(section, name, task(blocks, torch.bfloat16, prefix, length, examples, batch))


def transmute_case(section: Section, name: str, task: Any) -> None:
    examples, length = task.tokens.shape
    few = min(4, task.batch)
    prefix = len(task.header) + len(task.instruction)
    text = f"{len(task.decoder.blocks)} blocks, attention, {examples} examples in batches of {task.batch}"
    case = Case("transmute", text, f"{name} P{prefix} n{length}", "bfloat16")
    task.run("layerwise")  # leaves the prefixes that one_forward reads
    runs: dict[str, tuple[Callable[[], Any], int]] = {
        "layerwise": (lambda: task.run("layerwise"), examples),
        "one forward of e with context, cached prefix": (task.one_forward, examples),
        "prefix cached and repeated, no head, hooks": (task.strong, examples),
        "two_pass": (lambda: task.run("two_pass"), examples),
        "sequential": (lambda: task.run("sequential"), examples),
        "two forwards, hooks, batches": (lambda: task.naive(task.batch, task.batch), task.batch),
        "two forwards, hooks, one by one": (lambda: task.naive(1, few), few),
    }
    section.record(time_runs(section, case, runs, length))


def time_runs(section: Section, case: Case, runs: dict[str, tuple[Callable[[], Any], int]], length: int) -> list[dict]:
    """Milliseconds and tokens per second of whole runs, in turn; a run that fails is left out."""
    device = section.device
    times: dict[str, list[float]] = {}
    for round_index in range(-section.warm, section.rounds):
        for name, (run, examples) in list(runs.items()):
            if round_index > 0 and time.monotonic() > section.end:
                break
            start = section.clock()
            done = section.attempt(f"{case.shape}, {name}", lambda run=run: (run(), section.clock()))
            if done is None:
                del runs[name]
                times.pop(name, None)
            elif round_index >= 0:
                times.setdefault(name, []).append((done[1] - start) * 1e3 / examples)
    rows, peer = [], next(iter(times), "")
    for name, values in times.items():
        middle = statistics.median(values)
        ratio = middle / statistics.median(times[peer])
        spread = {"low": min(values), "high": max(values)}
        rows.append(harness.row(case, name, "time per example", middle, "ms", device, peer=peer, ratio=ratio, **spread))
        rows.append(harness.row(case, name, "tokens of e per second", 1e3 * length / middle, "1/s", device))
    return rows


SECTIONS: dict[str, Callable[[Section], None]] = {
    "fit-270m": lambda section: default_fit(section, "270m"),
    "attention": attention,
    "accumulate": accumulate,
    "norms": norms,
    "fit-1b": lambda section: default_fit(section, "1b"),
    "fit-4b": lambda section: default_fit(section, "4b"),
    "transmute-1b": lambda section: transmute(section, "1b"),
    "transmute-4b": lambda section: transmute(section, "4b"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=[*SECTIONS, "all"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes of a few elements, to run the code")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which no further size is begun")
    parser.add_argument("--output", type=Path, default=harness.RESULTS, help="where the device's results file lies")
    options = parser.parse_args()
    harness.RESULTS = options.output
    wrong = 0
    for name, run in SECTIONS.items():
        if options.section in (name, "all"):
            section = Section(options.device, options.tiny, options.seconds)
            section.attempt(name, lambda run=run, section=section: run(section))
            wrong += section.wrong
    return min(wrong, 100)


if __name__ == "__main__":
    sys.exit(main())
