"""How a fit's time and memory grow: over examples, their length, the prompt, the hidden size, the blocks.

python benchmarks/measure/bench_growth.py [--axis examples ...] [--rounds 3] [--largest 1.0]

One axis at a time from a middle point: 64 examples of 32 tokens behind a prompt of 64, 4 blocks of Gemma 3's kind, 512
wide. Weights are random and completions given, so that nothing is written: the default fit alone, its prefixes read and
its equations solved. The largest values take minutes; `--largest 0.1` leaves out those above a tenth of each axis's
last. Each point runs in a process of its own, and its peak is what the process held beyond what it held before the fit.
Rows go to results/growth.csv as they are measured, and points that are there are kept; exponents are in
benchmarks/tables/growth_tables.py.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import harness
import torch
from bench_transmute import IDS
from tqdm import tqdm
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from thought_kernels.evaluation.measures.memory import MemoryPeak
from thought_kernels.evaluation.records.files import replace_file
from thought_kernels.fitting.fit import fit
from thought_kernels.fitting.recipe import Recipe
from thought_kernels.models import describe
from thought_kernels.prompts.prompt import EncodedExample

RESULTS = Path(__file__).resolve().parents[1] / "results" / "growth.csv"
HEADER = 4  # BOS and the turn's opening; part of the prompt
BATCH = 32
HEAD = 64
WINDOW = 512
AXES = {
    "examples": (4, 16, 64, 256, 1024, 4096),
    "length": (8, 32, 128, 512),
    "prompt": (16, 64, 256, 1024, 4096),
    "hidden": (256, 512, 1024, 2048),
    "blocks": (2, 4, 8, 16),
}


@dataclass(frozen=True)
class Point:
    """What is fitted: numbers of examples, of an example's and the prompt's tokens, the hidden size, blocks."""

    examples: int = 64
    length: int = 32
    prompt: int = 64
    hidden: int = 512
    blocks: int = 4


def build(point: Point) -> Any:
    """A random Gemma 3 of these sizes: as wide in its heads as its stream, four times in its MLP."""
    config = Gemma3TextConfig(
        vocab_size=IDS, hidden_size=point.hidden, intermediate_size=4 * point.hidden, num_hidden_layers=point.blocks,
        num_attention_heads=point.hidden // HEAD, num_key_value_heads=1, head_dim=HEAD, query_pre_attn_scalar=HEAD,
        sliding_window=WINDOW, max_position_embeddings=8192,
        layer_types=["full_attention" if index % 4 == 3 else "sliding_attention" for index in range(point.blocks)],
    )  # fmt: skip
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).eval().requires_grad_(False)


@torch.no_grad()
def measured(point: Point, rounds: int) -> tuple[list[float], float]:
    """Seconds of each round but the first, and peak MiB of the first beyond what was held."""
    decoder = describe(build(point))
    generator = torch.Generator().manual_seed(1)
    header, instruction = (
        torch.randint(IDS, (size,), generator=generator).tolist() for size in (HEADER, point.prompt - HEADER)
    )
    rows = torch.randint(IDS, (point.examples, point.length), generator=generator).tolist()
    encoded = [EncodedExample(header, instruction, row, len(row)) for row in rows]
    recipe = Recipe().for_model(decoder)
    with MemoryPeak(torch.device("cpu")) as before:
        pass
    with MemoryPeak(torch.device("cpu")) as during:
        fit(decoder, recipe, encoded, batch_size=BATCH)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        fit(decoder, recipe, encoded, batch_size=BATCH)
        seconds.append(time.perf_counter() - start)
    return seconds, during.host_mib - before.host_mib


def record(row: dict[str, Any]) -> None:
    """Adds a row to the results."""
    rows = [*known(), {name: str(value) for name, value in row.items()}]

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    replace_file(RESULTS, write)


def known() -> list[dict[str, str]]:
    if not RESULTS.is_file():
        return []
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def one(axis: str, value: int, rounds: int) -> None:
    """Measures one point in this process, and records it."""
    seconds, peak = measured(replace(Point(), **{axis: value}), rounds)
    record({
        "axis": axis, "value": value, "seconds": f"{statistics.median(seconds):.4g}", "low": f"{min(seconds):.4g}",
        "high": f"{max(seconds):.4g}", "peak_mib": f"{peak:.1f}", "rounds": rounds,
        "device": harness.device_name("cpu"), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", nargs="+", choices=[field.name for field in fields(Point)], default=list(AXES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--largest", type=float, default=1.0, help="share of each axis's last value")
    parser.add_argument("--point", nargs=2, metavar=("AXIS", "VALUE"), help="this one, in this process")
    options = parser.parse_args()
    if options.point:
        one(options.point[0], int(options.point[1]), options.rounds)
        return
    here = (harness.device_name("cpu"), str(torch.get_num_threads()))
    done = {(row["axis"], int(row["value"])) for row in known() if (row["device"], row["threads"]) == here}
    wanted = [
        (axis, value) for axis in options.axis for value in AXES[axis]
        if value <= options.largest * AXES[axis][-1] and (axis, value) not in done
    ]  # fmt: skip
    for axis, value in tqdm(wanted, desc="points"):
        command = [sys.executable, __file__, "--point", axis, str(value), "--rounds", str(options.rounds)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
