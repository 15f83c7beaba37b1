"""The default fit, both sites and solving included, against one forward of the same examples.

python benchmarks/measure/bench_fit.py                              Gemma 3 270M's shape, all cases, 5 rounds
python benchmarks/measure/bench_fit.py --model 1b --case 32,32,32
python benchmarks/measure/bench_fit.py --blocks 3 --cpu-time        a quick look on a busy machine, OMP_NUM_THREADS=1

Weights are random. A case is P,n,rows: tokens of the prefix and of each example, and examples. The peer is one forward
of the examples with context over the cached prefix (hooked_forwards.one_forward), without the head. A fit reads its
prefixes, runs both streams, sums and solves. Beside what is measured stand the products that have to be counted: what
no fit of two streams can do without, in units of that forward's. Every fit is compared with one in float64 first.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import harness
import torch
from bench_transmute import IDS, build
from hooked_forwards import one_forward
from torch import Tensor

from thought_kernels.estimation.accumulator import ThoughtAccumulator
from thought_kernels.fitting.fit import fit
from thought_kernels.fitting.recipe import Recipe
from thought_kernels.models import describe
from thought_kernels.models.decoder import Block, Decoder
from thought_kernels.pairing.batches import Group, prefix_blocks
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.prompt import EncodedExample

PEER = "one forward with context, cached prefix"
HEADER = 4  # BOS and the turn's opening; part of P
BATCH = 32
CASES = ((32, 32, 32), (256, 256, 32), (32, 55, 128))  # the last: as many rows as 64 inputs, two each, make
CHECKED = 2  # blocks and examples in float64
ALLOWED = 1e-3  # of Δ's norm: float32's rounding, which two blocks of solves magnify


class Task:
    """Prompts of one case and one model."""

    def __init__(self, model: Any, case: tuple[int, int, int]) -> None:
        self.decoder = describe(model)
        prefix, length, rows = case
        generator = torch.Generator().manual_seed(1)
        self.prefix = torch.randint(IDS, (prefix,), generator=generator).tolist()
        self.tokens = torch.randint(IDS, (rows, length), generator=generator)
        group = Group(tuple(self.prefix[:HEADER]), tuple(self.prefix[HEADER:]), (), ())
        cached = prefix_blocks(self.decoder, group, len(self.decoder.blocks) - 1)
        self.cached = [block.with_context for block in cached]

    def fit(self, decoder: Decoder | None = None, examples: int | None = None) -> ThoughtPatch:
        """The default recipe's patch."""
        decoder = decoder or self.decoder
        header, instruction = self.prefix[:HEADER], self.prefix[HEADER:]
        encoded = [EncodedExample(header, instruction, row, len(row)) for row in self.tokens[:examples].tolist()]
        return fit(decoder, Recipe().for_model(decoder), encoded, batch_size=BATCH)

    def forward(self) -> Tensor:
        """The peer."""
        return one_forward(self.decoder, self.cached, self.tokens, BATCH)


def check(name: str, case: tuple[int, int, int], device: str = "cpu") -> None:
    """Stops unless a fit of a few blocks and examples is that of the same model in float64."""
    with torch.device(device):
        model = build(name, CHECKED, IDS)
    task = Task(model, case)
    wanted = task.fit(describe(copy.deepcopy(model).double()), CHECKED)
    for key, entry in task.fit(examples=CHECKED).entries.items():
        truth, found = wanted.entries[key].dense(), entry.dense()
        assert truth is not None and found is not None
        error = float(torch.linalg.vector_norm(found.double() - truth) / torch.linalg.vector_norm(truth))
        if not error <= ALLOWED:
            raise SystemExit(
                f"{name} {case}: the fit errs by {error:.3g} at {key}, allowed {ALLOWED}; nothing is timed"
            )


def counted(block: Block, hidden: int, case: tuple[int, int, int]) -> dict[str, float]:
    """Floating-point operations of one block, per token; those of a solve shared among the tokens, float64."""
    prefix, length, rows = case
    a, f = block.attention_width, block.mlp_width or 0
    keys = block.num_key_value_heads * block.head_dim
    tokens = rows * length
    systems = {a: a, f: hidden}  # width of a: width of δ
    return {
        "forward": 2 * (2 * hidden * a + 2 * hidden * keys + 3 * hidden * f) + 4 * a * (prefix + (length + 1) / 2),
        "sums": a * (a + 2 * a) + f * (f + 2 * hidden),  # half of a symmetric product
        "patch": 2 * (a * a + f * hidden),
        "solve": sum(d**3 / 3 + 2 * out * d**2 for d, out in systems.items()) / tokens,
    }


def timed(clock: Callable[[], float], function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """The function, its time added to spent[0]."""

    def run(*args: Any, **options: Any) -> Any:
        start = clock()
        try:
            return function(*args, **options)
        finally:
            spent[0] += clock() - start

    return run


Times = dict[str, list[float]]


def time_parts(task: Task, clock: Callable[[], float], rounds: int) -> Times:
    """Seconds of the peer, before and after a fit, of the fit and of its solving, in every round."""
    times: Times = {provider: [] for provider in (PEER, "fit", "fit, without solving", "solving")}
    spent = [0.0]
    solve_part = timed(clock, ThoughtAccumulator.solve_part, spent)
    with mock.patch.object(ThoughtAccumulator, "solve_part", solve_part):
        for _ in range(rounds):
            spent[0], start = 0.0, clock()
            task.forward()
            middle = clock()
            task.fit()
            end = clock()
            task.forward()
            whole = end - middle
            found = ((middle - start + clock() - end) / 2, whole, whole - spent[0], spent[0])
            for values, seconds in zip(times.values(), found, strict=True):
                values.append(seconds)
    return times


def time_rows(case: harness.Case, kind: str, times: Times, device: str) -> list[dict]:
    """Rows of the times, and of solving's share of them."""
    lines = []
    for provider, values in times.items():
        ratio = statistics.median(value / peer for value, peer in zip(values, times[PEER], strict=True))
        lines.append(
            harness.row(
                case, provider, kind, statistics.median(values), "s", device, low=min(values), high=max(values),
                peer=PEER, ratio=ratio,
            )
        )  # fmt: skip
    share = statistics.median(solve / whole for solve, whole in zip(times["solving"], times["fit"], strict=True))
    return [*lines, harness.row(case, "solving", f"share of the fit's {kind}", share, "", device)]


@torch.no_grad()
def bench(name: str, numbers: tuple[int, int, int], options: argparse.Namespace) -> None:
    check(name, numbers)
    task = Task(options.built, numbers)
    task.forward()
    times = time_parts(task, time.process_time if options.cpu_time else time.perf_counter, options.rounds)
    flops = counted(task.decoder.blocks[0], task.decoder.hidden_size, numbers)
    least = (2 * flops["forward"] + flops["sums"] + flops["patch"]) / flops["forward"]
    prefix, length, rows = numbers
    blocks = len(task.decoder.blocks)
    case = harness.Case(
        "fit", f"attention and down, {blocks} blocks, {rows} rows", f"{name} P{prefix} n{length}", "float32"
    )
    lines = time_rows(case, "CPU time" if options.cpu_time else "time", times, "cpu")
    lines.append(harness.row(case, "two streams, sums and patches", "products counted, in forwards", least, "", "cpu"))
    lines.append(
        harness.row(case, "solving", "products counted, in forwards", flops["solve"] / flops["forward"], "", "cpu")
    )
    harness.record(lines, "cpu")


def numbers_of(text: str) -> tuple[int, int, int]:
    prefix, length, rows = map(int, text.split(","))
    return prefix, length, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="270m", choices=["270m", "1b", "4b"])
    parser.add_argument("--blocks", type=int, help="fewer blocks than the model has, for a quick look")
    parser.add_argument("--case", type=numbers_of, action="append", help="P,n,rows; may be given several times")
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine, with OMP_NUM_THREADS=1")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    options.built = build(options.model, options.blocks, IDS)
    for numbers in options.case or CASES:
        bench(options.model, numbers, options)


if __name__ == "__main__":
    main()
