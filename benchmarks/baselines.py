"""What else the same examples can be made into: baselines on the reserved instructions, inside and outside.

python benchmarks/baselines.py [--seeds 0 1] [--tasks a,b]      writes results/baselines.csv, prints the means

Examples and inputs are those of `recipes.py --final` with the same seed. Every baseline's settings are chosen by KL to
the prompted model on the examples alone, as in `thought-kernels evaluate`, whose baselines these are.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

from recipes import RESULTS, Bench
from tqdm import tqdm

import thought_kernels as tk
from thought_kernels.demo import CHECKPOINT
from thought_kernels.demo.tasks import RESERVED_FOR_FINAL_STUDY, TASKS
from thought_kernels.evaluate.files import write_csv
from thought_kernels.models.load import load

OUTPUT = RESULTS / "baselines.csv"
EXAMPLES = 32
RANGES = ("inside", "outside")


def measured(model, tokenizer, name: str, seed: int) -> list[dict[str, object]]:
    """Accuracy and recovered effect of the default patch and every baseline, on both ranges of one instruction."""
    task = TASKS[name]
    bench = Bench(model, tokenizer, task, EXAMPLES, seed, on_held_out=True)
    rows = []
    for where, examples, trial in (("inside", bench.inside, bench.fresh), ("outside", bench.outside, bench.far)):
        patch = tk.transmute(model, tokenizer, task.instruction, examples)
        report = tk.evaluate(
            model, tokenizer, patch, examples, held_out=trial.questions, answers=trial.answers, sections="baselines",
            sweep_inputs=len(trial), max_new_tokens=20,
        )  # fmt: skip
        section = report.sections["baselines"]
        if section.error:
            raise SystemExit(f"{name}, {where}: {section.error}")
        found = {(figure.subject, figure.quantity): figure.value for figure in section.figures}
        rows += [
            {
                "task": name, "seed": seed, "range": where, "method": subject, "accuracy": round(value, 6),
                "prompted": round(found["prompted", "accuracy"], 6),
                "recovered": round(found[subject, "recovered"], 6) if (subject, "recovered") in found else "",
            }
            for (subject, quantity), value in found.items()
            if quantity == "accuracy" and subject != "prompted"
        ]  # fmt: skip
    return rows


def means(rows: list[dict[str, str]]) -> list[tuple[str, float, float, float]]:
    """(method, share of the prompted accuracy inside, recovered inside, share outside), the best outside first."""

    def mean(method: str, where: str, share: bool) -> float:
        mine = [row for row in rows if row["method"] == method and row["range"] == where]
        return statistics.mean(
            float(row["accuracy"]) / float(row["prompted"]) if share else float(row["recovered"] or 0) for row in mine
        )

    found = [
        (method, mean(method, "inside", True), mean(method, "inside", False), mean(method, "outside", True))
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    return sorted(found, key=lambda line: -line[3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tasks", default=",".join(RESERVED_FOR_FINAL_STUDY))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    model, tokenizer = load(CHECKPOINT)
    rows: list[dict[str, object]] = []
    for seed in options.seeds:
        for name in tqdm(options.tasks.split(",")):
            rows += measured(model, tokenizer, name, seed)
            write_csv(rows, options.output)
    with options.output.open(newline="") as file:
        for method, inside, recovered, outside in means(list(csv.DictReader(file))):
            print(f"{method:28} {inside:8.3f} {recovered:10.4f} {outside:8.3f}")


if __name__ == "__main__":
    main()
