"""A whole transmutation, all blocks at the attention site, against hooks on two Hugging Face forwards.

python benchmarks/measure/bench_transmute.py                        Gemma 3 270M's shape, 64 examples in batches of 8
python benchmarks/measure/bench_transmute.py --model 1b --providers layerwise,floor,strong --prefix 32
python benchmarks/measure/bench_transmute.py --memory-only          peak memory against a plain forward's

Weights are random. Times are per example, from a whole run: reading the prefixes and every accumulation included,
solving excluded and reported apart. The naive peers cost the same for every example, so they run over --naive-examples
of them only, and their rows say so. Every provider's sums are checked before anything is timed; one batch warms each
up; then all run in turn, round after round. Rows are written after every round; with --journal FILE a run that was
broken off goes on where it stopped, and more rounds can be added to it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from hooked_forwards import naive, naive_layerwise, one_forward, strong, with_context
from shapes import GEMMA3
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from thought_kernels.estimation.accumulator import ThoughtAccumulator
from thought_kernels.models import describe
from thought_kernels.models.linear import FastLinear
from thought_kernels.pairing.batches import group_examples
from thought_kernels.pairing.pairings import PAIRINGS, Run
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import SitePatch
from thought_kernels.prompts.prompt import EncodedExample

INTERMEDIATE = {"270m": 2048, "1b": 6912, "4b": 10240}
VOCABULARY = 262144
IDS = 1024  # tokens are drawn below this, so that a float64 copy of the model can do with a small embedding
HEADER = 4  # BOS and the turn's opening; part of P
PROVIDERS = ("layerwise", "cached", "floor", "strong", "onednn", "two_pass", "sequential", "batched", "single")
PROMPTS = ((32, 32), (256, 32))  # (P, n): tokens of [H, I] and of e


def build(name: str, blocks: int | None = None, vocabulary: int = VOCABULARY) -> Any:
    """A random Gemma 3 of a real model's shape; five sliding blocks to a full one, as in all of them."""
    shape = GEMMA3[name]
    count = blocks or shape.blocks
    config = Gemma3TextConfig(
        vocab_size=vocabulary, hidden_size=shape.hidden, intermediate_size=INTERMEDIATE[name], num_hidden_layers=count,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads, head_dim=shape.head_dim,
        query_pre_attn_scalar=shape.head_dim, sliding_window=shape.window,
        layer_types=["full_attention" if index % 6 == 5 else "sliding_attention" for index in range(count)],
    )  # fmt: skip
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).eval().requires_grad_(False)


Outputs = dict[str, Tensor]


class Task:
    """Prompts of one shape, and the providers over them."""

    def __init__(self, model: Any, prefix: int, length: int, examples: int, batch: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.model, self.decoder, self.batch = model, describe(model), batch
        self.ready: Run | None = None  # has read its prefixes
        self.header, self.instruction = torch.randint(IDS, (prefix,), generator=generator).split(
            [HEADER, prefix - HEADER]
        )
        self.tokens = torch.randint(IDS, (examples, length), generator=generator)

    def on(self, model: Any, examples: int) -> Task:
        """The same prompts for another model and fewer examples."""
        task = copy.copy(self)
        task.model, task.decoder, task.tokens = model, describe(model), self.tokens[:examples]
        return task

    def run(self, pairing: str) -> ThoughtAccumulator:
        """This project's run, reading the prefixes included."""
        run = self.prepared()
        with torch.no_grad():
            PAIRINGS[pairing](run)
        self.prefixes = [prefix.with_context for prefix in run.prefixes[0]]
        return run.accumulator

    @torch.no_grad()
    def prepared(self) -> Run:
        """A run that has read its prefixes; where `sequential` solves, it gets a dense patch of zeros to apply."""
        header, instruction = self.header.tolist(), self.instruction.tolist()
        encoded = [EncodedExample(header, instruction, row, len(row)) for row in self.tokens.tolist()]
        dtype = self.model.dtype
        zeros = SitePatch(matrix=torch.zeros(self.width, self.width, dtype=dtype, device=self.model.device))
        return Run(
            decoder=self.decoder,
            groups=group_examples(encoded, self.batch, "all", dtype),
            layers=frozenset(range(len(self.decoder.blocks))),
            sites=frozenset({"attention"}),
            accumulator=ThoughtAccumulator(dtype=torch.promote_types(dtype, torch.float32)),
            solve=lambda layers, sites: ThoughtPatch({(layer, "attention"): zeros for layer in layers}, {}),
            header_weight=0.0,
            tick=lambda: None,
        )

    @property
    def width(self) -> int:
        return self.decoder.blocks[0].attention_width

    def naive(self, batch: int, examples: int) -> ThoughtAccumulator:
        return naive(self.model, self.header, self.instruction, self.tokens[:examples], batch)

    def strong(self) -> ThoughtAccumulator:
        return strong(self.model, self.header, self.instruction, self.tokens, self.batch)

    def onednn(self) -> ThoughtAccumulator:
        """The strong peer with the matrix products that this project's own forward takes."""
        with FastLinear():
            return self.strong()

    def naive_layerwise(self) -> ThoughtAccumulator:
        return naive_layerwise(self.model, self.header, self.instruction, self.tokens)

    def cached(self) -> ThoughtAccumulator:
        """The layerwise run that `ready` has prepared, once."""
        assert self.ready is not None
        PAIRINGS["layerwise"](self.ready)
        return self.ready.accumulator

    def one_forward(self) -> Tensor:
        return one_forward(self.decoder, self.prefixes, self.tokens, self.batch)

    def with_context(self) -> Tensor:
        return with_context(self.model, self.header, self.instruction, self.tokens)


def sums(accumulator: ThoughtAccumulator) -> dict[str, Tensor]:
    """cross and gram of every block, by name."""
    found = {}
    for layer in accumulator.layers:
        held = accumulator.sums(layer, "attention")
        assert held is not None and held.cross is not None and held.gram is not None
        found |= {f"cross of block {layer}": held.cross, f"gram of block {layer}": held.gram}
    return found


def check(case: harness.Case, task: Task, examples: int = 4) -> None:
    """All two_pass providers against naive hooks in float64, layerwise against hooks of its own, plain is float32.

    oneDNN's products round more than MKL's (bench_linear.py), so plain PyTorch is held to the same products as the
    provider that is compared with it.
    """
    small = task.on(task.model, examples)
    task.model.lm_head, head = torch.nn.Identity(), task.model.lm_head  # the float64 copy needs no head ...
    embedding = task.model.base_model.embed_tokens.weight
    task.model.base_model.embed_tokens.weight = torch.nn.Parameter(embedding[:IDS].clone(), requires_grad=False)
    wide = small.on(copy.deepcopy(task.model).double(), examples)  # ... and only the embeddings that are looked up
    task.model.base_model.embed_tokens.weight, task.model.lm_head = embedding, head

    def compare(providers: dict[str, Callable[[], Outputs]], plain: Callable[[], Outputs], truth: Outputs) -> None:
        checked = [harness.Provider(name, run, run) for name, run in providers.items()]
        harness.check(case, checked, truth, plain())

    def same_products(plain: Callable[[], Outputs]) -> Outputs:
        with FastLinear():
            return plain()

    def naive_sums() -> Outputs:
        return sums(small.naive(1, examples))

    truth = sums(wide.naive(1, examples))
    compare(
        {"naive, batches": lambda: sums(small.naive(task.batch, examples)), "strong": lambda: sums(small.strong())},
        naive_sums, truth,
    )  # fmt: skip
    ours = {
        "strong, oneDNN": lambda: sums(small.onednn()),
        "two_pass": lambda: sums(small.run("two_pass")),
        "sequential": lambda: sums(small.run("sequential")),  # with patches of zero it is two_pass
    }
    compare(ours, lambda: same_products(naive_sums), truth)
    small.ready = small.prepared()
    layerwise = {"layerwise": lambda: sums(small.run("layerwise")), "cached prefix": lambda: sums(small.cached())}
    compare(layerwise, lambda: same_products(lambda: sums(small.naive_layerwise())), sums(wide.naive_layerwise()))
    floor = {"one forward": lambda: {"last attention": small.one_forward()}}
    last = {"last attention": wide.with_context()}
    compare(floor, lambda: same_products(lambda: {"last attention": small.with_context()}), last)


def bench_time(name: str, prefix: int, length: int, options: argparse.Namespace) -> None:
    task = Task(options.built, prefix, length, options.examples, options.batch)
    shape = f"{name} P{prefix} n{length}"
    text = f"{len(task.decoder.blocks)} blocks, attention, {options.examples} examples in batches of {options.batch}"
    case = harness.Case("transmute", text, shape, "float32")
    check(case, task)
    count, few = options.examples, min(options.naive_examples, options.examples)
    task.run("layerwise")  # leaves the prefixes that one_forward reads
    providers: dict[str, tuple[str, Callable[[Task, int], object], int]] = {
        "layerwise": ("layerwise", lambda task, _: task.run("layerwise"), count),
        "cached": ("layerwise, cached prefix", lambda task, _: task.cached(), count),
        "floor": ("one forward of e with context, cached prefix", lambda task, _: task.one_forward(), count),
        "strong": ("prefix cached and repeated, no head, hooks", lambda task, _: task.strong(), count),
        "onednn": ("prefix cached and repeated, no head, hooks, oneDNN", lambda task, _: task.onednn(), count),
        "two_pass": ("two_pass", lambda task, _: task.run("two_pass"), count),
        "sequential": ("sequential", lambda task, _: task.run("sequential"), count),
        "batched": ("two forwards, hooks, batches", lambda task, n: task.naive(task.batch, n), few),
        "single": ("two forwards, hooks, one by one", lambda task, n: task.naive(1, n), few),
    }
    providers = {key: provider for key, provider in providers.items() if key in {"layerwise", *options.providers}}
    clock = time.process_time if options.cpu_time else time.perf_counter
    measure = "CPU time per example" if options.cpu_time else "time per example"
    settings = [*case, measure, torch.get_num_threads()]
    journal = read_journal(options.journal, settings)
    warm = task.on(task.model, min(options.batch, count))
    for key, (_, run, examples) in providers.items():
        if any((key, number, examples) not in journal for number in range(options.rounds)):
            warm.ready = warm.prepared()
            with torch.no_grad():
                run(warm, len(warm.tokens))
    for number in range(options.rounds):
        for key, (_, run, examples) in providers.items():
            if (key, number, examples) in journal:
                continue
            task.ready = task.prepared() if key == "cached" else None
            start = clock()
            with torch.no_grad():
                run(task, examples)
            journal[key, number, examples] = (clock() - start) * 1e3 / examples
            if options.journal:
                with options.journal.open("a") as file:
                    print(json.dumps([settings, [key, number, examples], journal[key, number, examples]]), file=file)
        peers = [journal["layerwise", index, count] for index in range(number + 1)]
        rows = []
        for key, (provider, _, examples) in providers.items():
            values = [journal[key, index, examples] for index in range(number + 1)]
            ratio = statistics.median(value / other for value, other in zip(values, peers, strict=True))
            label = provider if examples == count else f"{provider}, {examples} examples"
            rows.append(
                harness.row(
                    case, label, measure, statistics.median(values), "ms", "cpu", low=min(values), high=max(values),
                    peer="layerwise", ratio=ratio,
                )
            )  # fmt: skip
        print(f"after {number + 1} of {options.rounds} rounds")
        harness.record(rows, "cpu")
    accumulator = task.run("layerwise")
    start = time.perf_counter()
    accumulator.solve("ridge")
    harness.record([harness.row(case, "ridge, all blocks", "solve", time.perf_counter() - start, "s", "cpu")], "cpu")


def read_journal(path: Path | None, settings: list) -> dict[tuple[str, int, int], float]:
    """(provider, round, examples) -> ms per example, of the earlier rounds with these settings."""
    if path is None or not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {tuple(key): value for held, key, value in lines if held == settings}


MEMORY = ("plain forward", "layerwise", "two_pass", "sequential")


def peak(provider: str, name: str, prefix: int, length: int, examples: int, batch: int) -> float:
    """MiB of a provider's peak beyond the weights and, for the pairings, the sums; for a process of its own."""
    task = Task(build(name, vocabulary=IDS), prefix, length, examples, batch)
    prompts = torch.cat([torch.cat([task.header, task.instruction]).expand(batch, -1), task.tokens[:batch]], 1)
    with torch.no_grad():
        task.model.base_model(prompts[:1, :2])  # loads libraries, starts threads ...
    small = task.on(task.model, 1)
    small.tokens = small.tokens[:, :2]
    small.run("layerwise")  # ... and the extension
    accumulators = 0.0
    if provider != "plain forward":
        accumulators = 2 * len(task.decoder.blocks) * task.width**2 * 4 / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    with torch.no_grad():
        if provider == "plain forward":
            task.model.base_model(prompts, use_cache=False)
        else:
            task.run(provider)
    return status("VmHWM") - before - accumulators


def status(field: str) -> float:
    """A memory figure of this process, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def bench_memory(name: str, prefix: int, length: int, options: argparse.Namespace) -> None:
    case = harness.Case(
        "transmute", f"all blocks, {options.examples} examples in batches of {options.batch}, beyond weights and sums",
        f"{name} P{prefix} n{length}", "float32",
    )  # fmt: skip
    figures: dict[str, float] = {}
    for provider in MEMORY:
        arguments = [provider, name, str(prefix), str(length), str(options.examples), str(options.batch)]
        # Freed memory goes back to the system at once, or what earlier steps left would be counted for later ones.
        malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, "--peak", *arguments]
        child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **malloc})
        if child.returncode:
            raise SystemExit(child.stderr)
        figures[provider] = float(child.stdout.split()[-1])
    shape = GEMMA3[name]
    # Both streams of all examples at one boundary, which is what grows with the examples and is spilled past a budget.
    streams = 2 * options.examples * length * shape.hidden * 4 / 2**20
    figures["sequential, beyond its streams of one boundary too"] = figures["sequential"] - streams
    peer = MEMORY[0]
    rows = [
        harness.row(case, key, "peak memory", value, "MiB", "cpu", peer=peer, ratio=value / figures[peer])
        for key, value in figures.items()
    ]
    harness.record(rows, "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="270m", choices=sorted(INTERMEDIATE))
    parser.add_argument("--blocks", type=int, help="fewer blocks than the model has, for a quick look")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="fewer flatters nobody but the naive peers")
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine, with OMP_NUM_THREADS=1")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--naive-examples", type=int, default=16, help="of them, for the two naive peers")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefix", type=int, help="one of the P alone")
    parser.add_argument(
        "--providers", type=lambda text: text.split(","), default=list(PROVIDERS), help=f"of {','.join(PROVIDERS)}"
    )
    parser.add_argument("--journal", type=Path, help="jsonl of every time measured, read and added to")
    parser.add_argument("--memory-only", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        provider, name, *numbers = options.peak
        print(peak(provider, name, *map(int, numbers)))
        return
    unknown = set(options.providers) - set(PROVIDERS)
    if unknown or options.rounds < 1:
        parser.error(f"--providers must be among {','.join(PROVIDERS)} and --rounds at least 1, got {unknown or 0}")
    prompts = [prompt for prompt in PROMPTS if options.prefix in (None, prompt[0])]
    if not options.memory_only:
        options.built = build(options.model, options.blocks, options.vocabulary)
        for prefix, length in prompts:
            bench_time(options.model, prefix, length, options)
    if not options.no_memory:
        for prefix, length in prompts:
            bench_memory(options.model, prefix, length, options)


if __name__ == "__main__":
    main()
