"""Does the overlap that diagnose computes from weights predict what two patches do to each other?

    python benchmarks/measure/interference.py [--model DIR] [--tasks a,b,...] [--examples 32] [--inputs 64]
        [--strengths 1,0.3]

One patch per instruction, and for each ordered pair (a, b) the model with a's patch and b's, scaled by a strength,
added: how much further from the prompted model (a's instruction) than with a's patch alone, in nats per token of its
answers, and how much accuracy is lost. Beside it what diagnose predicts from the weights alone. The rank correlations
over all pairs go to a second file; so that instructions which are fragile whatever is added do not make up a
correlation, they are also taken within each a and averaged. Rows are written as they are finished, and a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import random
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from tqdm import tqdm

import thought_kernels as tk
from thought_kernels.demo import CHECKPOINT
from thought_kernels.demo.tasks import TASKS, held_out, inputs
from thought_kernels.evaluation.experiments.experiments import transmute_defaults
from thought_kernels.evaluation.measures.overlap import rank_correlation
from thought_kernels.evaluation.measures.trial import Trial
from thought_kernels.evaluation.records.digests import data_hash, fingerprint
from thought_kernels.models.load import load
from thought_kernels.spectral.diagnosis import interference
from thought_kernels.spectral.overlap import Interference

RESULTS = Path(__file__).resolve().parents[1] / "results"
TASK_NAMES = ("sum", "largest", "sort", "reverse", "first", "parity")
PREDICTIONS = ("felt", "felt_largest", "read", "write", "alignment", "norm")
MEASURES = ("divergence", "accuracy_lost")
COLUMNS = ("task", "other", "strength", *PREDICTIONS, "divergence_alone", "divergence_both", "divergence",
           "accuracy_alone", "accuracy_both", "accuracy_lost", "examples", "inputs", "seed", "weights",
           "recipe")  # fmt: skip


def predictions(found: Interference, other: Any) -> dict[str, float]:
    """felt is the one that diagnose reports; the others are there to be compared with it."""
    shared = list(found.sites.values())
    return {
        "felt": found.felt,
        "felt_largest": max(one.felt for one in shared),
        "read": fmean(one.read for one in shared),
        "write": fmean(one.write for one in shared),
        "alignment": fmean(one.alignment for one in shared),
        "norm": sum(entry.norm() ** 2 for entry in other.entries.values()) ** 0.5,  # knows nothing of the pair
    }


def spearman(rows: list[dict], prediction: str, measure: str) -> float:
    """Rank correlation over the rows; NaN where one side is constant, or of fewer than three."""
    found = rank_correlation([float(row[prediction]) for row in rows], [float(row[measure]) for row in rows])
    return float("nan") if found is None else found


def interval(
    rows: list[dict], prediction: str, measure: str, tasks: list[str], draws: int = 500
) -> tuple[float, float]:
    """95 % bootstrap interval over instructions, which the pairs share, rather than over pairs."""
    rng, found = np.random.default_rng(0), []
    for _ in range(draws):
        drawn = rng.choice(tasks, len(tasks))
        weight = {name: int((drawn == name).sum()) for name in tasks}
        sample = [row for row in rows for _ in range(weight[row["task"]] * weight[row["other"]])]
        if len({row["task"] for row in sample}) > 2:
            found.append(spearman(sample, prediction, measure))
    kept = [value for value in found if value == value]
    low, high = np.quantile(kept, [0.025, 0.975]) if kept else (float("nan"), float("nan"))
    return float(low), float(high)


def correlations(rows: list[dict]) -> list[dict]:
    tasks, lines = sorted({row["task"] for row in rows}), []
    for strength in sorted({row["strength"] for row in rows}, key=float, reverse=True):
        chosen = [row for row in rows if row["strength"] == strength]
        for measure, prediction in itertools.product(MEASURES, PREDICTIONS):
            groups = [[row for row in chosen if row["task"] == task] for task in tasks]
            within = [spearman(group, prediction, measure) for group in groups]
            known = [value for value in within if value == value]
            low, high = interval(chosen, prediction, measure, tasks)
            overall = spearman(chosen, prediction, measure)
            lines.append({
                "strength": strength, "measure": measure, "prediction": prediction, "pairs": len(chosen),
                "spearman": f"{overall:.3f}", "low": f"{low:.3f}", "high": f"{high:.3f}",
                "within_task": f"{fmean(known):.3f}" if known else "",
            })  # fmt: skip
    return lines


def write(path: Path, columns: list[str], rows: list[dict]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT))
    parser.add_argument("--tasks", default=",".join(TASK_NAMES))
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--inputs", type=int, default=64)
    parser.add_argument("--strengths", default="1,0.3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "interference.csv")
    settings = parser.parse_args()
    model, tokenizer = load(settings.model)
    # Rows of another model, or of other defaults of transmute (the column recipe is their hash), are not gone on from.
    weights = fingerprint(model)
    names, strengths = settings.tasks.split(","), [float(part) for part in settings.strengths.split(",")]
    key = {"examples": str(settings.examples), "inputs": str(settings.inputs), "seed": str(settings.seed),
           "weights": weights, "recipe": data_hash(transmute_defaults())}  # fmt: skip
    rows = []
    if settings.output.exists():
        with settings.output.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if all(row.get(name) == value for name, value in key.items())]
    done = {(row["task"], row["other"], float(row["strength"])) for row in rows}
    wanted = [(a, b, s) for a, b in itertools.permutations(names, 2) for s in strengths if (a, b, s) not in done]
    patches, known = {}, {}
    for name in tqdm(names if wanted else [], desc="patches"):
        seen = [text for text in inputs(TASKS[name]) if not held_out(text)]
        examples = random.Random(f"{settings.seed} {name}").sample(seen, settings.examples)
        patches[name] = tk.transmute(model, tokenizer, TASKS[name].instruction, examples)
    current, trial, alone = None, None, None
    for a, b, strength in tqdm(wanted, desc="pairs"):
        if a != current:
            task = TASKS[a]
            fresh = random.Random(f"{settings.seed} fresh").sample(
                [text for text in inputs(task) if held_out(text)], settings.inputs
            )
            answers = [task.answer(text) for text in fresh]
            trial = Trial(model, tokenizer, task.instruction, fresh, answers, known=known, max_new_tokens=24)
            with patches[a].applied(model):
                alone = trial.score(model)
            current = a
        other = strength * patches[b]
        with (patches[a] + other).applied(model):
            both = trial.score(model)
        divergence = [score.effect.patched / score.effect.tokens for score in (alone, both)]
        figures = {
            **predictions(interference(patches[a], [other], model)[0], other),
            "divergence_alone": divergence[0], "divergence_both": divergence[1],
            "divergence": divergence[1] - divergence[0], "accuracy_alone": alone.accuracy,
            "accuracy_both": both.accuracy, "accuracy_lost": alone.accuracy - both.accuracy,
        }  # fmt: skip
        shown = {name: f"{value:.6g}" for name, value in figures.items()}
        rows.append({"task": a, "other": b, "strength": f"{strength:g}", **shown, **key})
        write(settings.output, list(COLUMNS), rows)
    lines = correlations(rows)
    write(settings.output.with_name(f"{settings.output.stem}_correlations.csv"), list(lines[0]), lines)
    print(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
