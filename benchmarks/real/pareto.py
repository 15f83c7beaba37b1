"""What a patch's effect costs in drift on ordinary text, by three knobs: its scale, its ridge, a term for such text.

    python benchmarks/real/pareto.py --models gemma=DIR smol=DIR [--inputs 32 --written 64]

The term is `text_weight`; drift is that on other passages than it holds. Each point is a row of ../results/pareto.csv,
written at once; rows that are there are kept.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import BATCH_SIZE, MATCHES, MAX_NEW_TOKENS
from tasks import WORD_FORMAT, Task, task

from thought_kernels.evaluation.arguments import Data, Limits, read_subject
from thought_kernels.evaluation.measures.drift import Drift
from thought_kernels.evaluation.sections.subject import Subject
from thought_kernels.models.load import load
from thought_kernels.patches.patch import ThoughtPatch

OUTPUT = Path(__file__).parents[1] / "results" / "pareto.csv"
TASKS = {"gemma": "antonym", "smol": "french"}
KNOBS: dict[str, tuple[float, ...]] = {
    "scale": (0.6, 0.7, 0.8, 0.9, 1.0), "ridge": (0.1, 0.3, 1.0, 3.0, 10.0), "text_weight": (0.03, 0.1, 0.3, 1.0, 3.0),
}  # fmt: skip
KEY = ("model", "task", "inputs", "held_out", "written", "knob", "value")
COLUMNS = (*KEY, "recovered", "text_kl", "text_perplexity", "bare_perplexity", "text_tokens", "torch", "date")


def subject_of(model: Any, tokenizer: Any, of: Task, options: argparse.Namespace) -> Subject:
    labelled = [text if answer is None else {"prompt": text, "completion": answer} for text, answer in of.held_out]
    data = Data(
        examples=[text for text, _ in of.inputs], held_out=labelled, answers=None, outside=None, longer=None,
        paraphrases=(), others=(), unrelated=None, pool=None,
    )  # fmt: skip
    limits = Limits(
        inputs=options.held_out, sweep_inputs=options.held_out, lora_steps=1, batch_size=BATCH_SIZE,
        max_new_tokens=MAX_NEW_TOKENS[of.kind], seed=0,
    )  # fmt: skip
    return read_subject(
        model, tokenizer, of.instruction, None, data, limits, scorer=MATCHES.get(of.kind, "exact"),
        recipe={"written_inputs": options.written}, separator=None, without=None,
        format=WORD_FORMAT if of.kind == "word" else None,
    )  # fmt: skip


def patches(subject: Subject, wanted: list[tuple[str, float]]) -> Iterator[tuple[str, float, ThoughtPatch]]:
    """The patch at each setting of a knob, the other knobs at the recipe's own."""
    for knob, value in wanted:
        if knob == "scale":
            yield knob, value, value * subject.patch
        else:
            yield knob, value, subject.refit(replace(subject.recipe, **{knob: value}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--inputs", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--written", type=int, default=64, help="inputs that the model writes beside")
    parser.add_argument("--knobs", nargs="+", choices=KNOBS, default=list(KNOBS))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    held: set[tuple[str, ...]] = set()
    if options.output.exists():
        with options.output.open(newline="") as file:
            held = {tuple(row[name] for name in KEY) for row in csv.DictReader(file)}
    for name, _, path in (given.partition("=") for given in options.models):
        first = {
            "model": name, "task": TASKS[name], "inputs": options.inputs, "held_out": options.held_out,
            "written": options.written,
        }  # fmt: skip
        wanted = [
            (knob, value)
            for knob in options.knobs
            for value in KNOBS[knob]
            if tuple(str(cell) for cell in (*first.values(), knob, value)) not in held
        ]
        if wanted:
            measure(options, first, path, wanted)


def measure(options: argparse.Namespace, first: dict[str, Any], path: str, wanted: list[tuple[str, float]]) -> None:
    model, tokenizer = load(path)
    subject = subject_of(model, tokenizer, task(first["task"], seed=0, inputs=options.inputs), options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "transmute: .* completions did not end")
        drift, trial = Drift(model, tokenizer), subject.trial  # of the bare model
        for knob, value, patch in patches(subject, wanted):
            with patch.applied(model):
                score, reading = trial.score(model), drift.read(model)
            row = {
                **first, "knob": knob, "value": value, "recovered": round(score.effect.recovered, 5),
                "text_kl": round(reading.divergence, 6), "text_perplexity": round(reading.perplexity, 4),
                "bare_perplexity": round(drift.bare.perplexity, 4), "text_tokens": sum(reading.tokens),
                "torch": torch.__version__, "date": datetime.date.today().isoformat(),
            }  # fmt: skip
            new = not options.output.exists()
            with options.output.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(row)
            print(*(row[name] for name in ("model", "knob", "value", "recovered", "text_kl", "text_perplexity")))


if __name__ == "__main__":
    main()
