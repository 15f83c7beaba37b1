"""Seconds and peak memory of transmute from inputs whose completions are given, on a real model; writes real_given.csv.

    python benchmarks/real/given.py --models gemma=DIR smol=DIR

Peaks (Linux with glibc) are resident memory beyond what the process held before, beside the model's own forward over
the same prompts.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from measure import BATCH_SIZE, MAX_NEW_TOKENS, cost
from tasks import WORD_FORMAT, Task, task

import thought_kernels as tk
from thought_kernels.evaluation.measures.trial import prompted_texts
from thought_kernels.prompts.prompt import encode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "measure"))
from harness import device_name

OUTPUT = Path(__file__).parents[1] / "results" / "real_given.csv"
TASKS = {"gemma": "country-capital", "smol": "french"}
INPUTS, ROUNDS = 32, 3


def completed(model: Any, tokenizer: Any, of: Task, options: dict[str, Any]) -> list[dict[str, str]]:
    """The task's inputs with the prompted model's own completions."""
    questions = [question for question, _ in of.inputs[:INPUTS]]
    texts = prompted_texts(
        model, tokenizer, of.instruction, questions, batch_size=BATCH_SIZE, max_new_tokens=MAX_NEW_TOKENS[of.kind],
        **options,
    )  # fmt: skip
    return [{"prompt": q, "completion": text} for q, text in zip(questions, texts, strict=True)]


@torch.no_grad()
def forward(model: Any, rows: list[list[int]]) -> None:
    """The model's blocks over whole prompts, padded: what any use of the instruction costs."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    model.model(input_ids=ids, use_cache=False)


def measured(name: str, path: str) -> dict[str, Any]:
    model, tokenizer = tk.load(path)
    of = task(TASKS[name], seed=0, inputs=INPUTS)
    options = {"format": WORD_FORMAT} if of.kind == "word" else {}
    examples = completed(model, tokenizer, of, options)
    encoded = [encode(tokenizer, of.instruction, example, **options) for example in examples]
    rows = [[*row.with_prefix, *row.tokens] for row in encoded]

    def held(call: Any) -> float:
        with cost(torch.device("cpu")) as found:
            call()
        return found["peak_mib"]

    def fit() -> None:
        tk.transmute(model, tokenizer, of.instruction, examples, **options)

    forward_mib, fit_mib = held(lambda: forward(model, rows)), held(fit)
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        fit()
        seconds.append(time.perf_counter() - started)
    return {
        "model": name, "task": of.name, "inputs": INPUTS, "tokens": sum(len(row.tokens) for row in encoded),
        "seconds": round(statistics.median(seconds), 2), "peak_mib": fit_mib, "forward_mib": forward_mib,
        "device": device_name("cpu"), "threads": torch.get_num_threads(), "torch": version("torch"),
        "transformers": version("transformers"), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=PATH", help=f"of {', '.join(TASKS)}")
    rows = [measured(*entry.split("=", 1)) for entry in parser.parse_args().models]
    with OUTPUT.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
