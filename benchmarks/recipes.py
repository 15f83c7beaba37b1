"""Which recipe: the table that transmute's defaults were read off.

    python benchmarks/recipes.py [--model DIR] [--tasks a,b,...] [--examples 32] [--final] [--output FILE.csv]

Every row of the grid is fitted on development instructions only, never on tasks.RESERVED_FOR_FINAL_STUDY, and judged
twice: on fresh inputs of the examples' range, and outside it, on inputs none of whose numbers or words any example
held, nor any of its copies: substitutes are drawn from other words. Neither uses the inputs held out from training,
which the demonstration reports on. `--final` is the report on the reserved instructions, of a few rows of the grid, on
inputs held out from training. Rows are written as they are finished, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from tqdm import tqdm

import thought_kernels as tk
from thought_kernels.demo import CHECKPOINT
from thought_kernels.demo.tasks import RESERVED_FOR_FINAL_STUDY, TASKS, Task, held_out, inputs, split_by_symbols
from thought_kernels.evaluate.trial import Trial
from thought_kernels.models.load import load
from thought_kernels.transmute import fitting
from thought_kernels.transmute.accumulator import ThoughtAccumulator
from thought_kernels.transmute.substitution import word_tokens

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("model", "task", "recipe", "examples", "seed", "base", "prompted", "patched", "recovered",
           "recovered_values", "prompted_outside", "patched_outside", "seconds")  # fmt: skip
PAPER_C1 = (0.015, 1.5, 5.0, 15.0)
FINAL = ("default", "no copies", "affine", "affine, no copies", *(f"paper, c1 {c1}" for c1 in PAPER_C1))

Options = dict[str, Any]
# (block, site) -> what to solve there and ε: an estimator, or "centred", affine's matrix without its vector.
Places = Callable[[int, str], tuple[str, float]]


class ByPlace(ThoughtAccumulator):
    """Solves each block and site as a trial says, whatever estimator and ridge it is asked for."""

    def __init__(self, places: Places, **options: Any) -> None:
        super().__init__(**options)
        self._places = places

    def solve(self, *args: Any, layers: Any = None, sites: Any = None, **options: Any) -> tk.ThoughtPatch:
        entries = {}
        for layer, site in itertools.product(self.layers if layers is None else layers, sites or self.sites):
            estimator, options["ridge"] = self._places(layer, site)
            solved = super().solve(
                "affine" if estimator == "centred" else estimator, layers=[layer], sites=[site], **options
            )
            entry = solved.entries[layer, site]
            entries[layer, site] = replace(entry, vector=None, fit=None) if estimator == "centred" else entry
        return tk.ThoughtPatch(entries, solved.provenance)


def in_first_attention(estimator: str, epsilon: float) -> Options:
    """The default recipe but for the attention site of block 0: what enters there is the instruction itself."""
    return {
        "places": lambda layer, site: (estimator, epsilon) if (layer, site) == (0, "attention") else ("ridge", 0.01)
    }


def at_sites(at_attention: float, at_mlp: float) -> Options:
    """The default recipe with an ε for each site."""
    return {"places": lambda _, site: ("ridge", at_attention if site == "attention" else at_mlp)}


def recipes(blocks: int) -> Iterator[tuple[str, Options]]:
    """The default and changes to it; "no copies" and the rows after it have the ridge that is best without copies."""
    ridge: Options = {"estimator": "ridge", "ridge": 0.01, "substitutions": 8}
    yield "default", {}
    for copies in (2, 4, 16):
        yield f"{copies} copies", ridge | {"substitutions": copies}
    for epsilon in (0.001, 0.003, 0.03, 0.1):
        yield f"ridge {epsilon}", ridge | {"ridge": epsilon}
    yield "exact", ridge | {"estimator": "exact"}
    for epsilon in (0.01, 0.1):
        yield (
            "affine" if epsilon == 0.1 else f"affine, ridge {epsilon}",
            ridge | {"estimator": "affine", "ridge": epsilon},
        )
    yield (
        "affine at attention only",
        {"places": lambda _, site: ("affine", 0.1) if site == "attention" else ("ridge", 0.01)},
    )
    for at_attention, at_mlp in ((0.03, 0.01), (0.03, 0.003), (0.1, 0.003), (0.01, 0.03)):
        yield f"ridge {at_attention} at attention, {at_mlp} at mlp", at_sites(at_attention, at_mlp)
    yield "affine in block 0's attention only", in_first_attention("affine", 0.1)
    yield "centred in block 0's attention", in_first_attention("centred", 0.1)
    for epsilon in (0.1, 1.0):
        yield f"ridge {epsilon} in block 0's attention", in_first_attention("ridge", epsilon)
    yield "no attention patch in block 0", in_first_attention("ridge", 1e6)
    yield "attention alone", {"sites": ("attention",)}
    yield "attention, mlp and residual", {"sites": ("attention", "mlp", "residual")}
    yield "mlp alone", {"sites": ("mlp",)}
    yield "mlp and residual", {"sites": ("mlp", "residual")}
    yield "mean, automatic scale", {"estimator": "mean", "scale": "auto", "substitutions": 8}
    yield "layerwise", {"pairing": "layerwise"}
    yield "two_pass", {"pairing": "two_pass"}
    yield "norm", {"normalization": "norm"}
    yield "squared_norm", {"normalization": "squared_norm"}
    yield "header_weight 0.1", {"header_weight": 0.1}
    yield "answer tokens", {"tokens": "answer"}
    yield "first half of the blocks", {"layers": range(blocks // 2)}
    yield "second half of the blocks", {"layers": range(blocks // 2, blocks)}
    for rank in (4, 8, 16):
        yield f"rank {rank}", {"rank": rank}
    yield "no copies", {"substitutions": 0, "ridge": 0.1}
    for epsilon in (0.01, 0.03, 0.3, 1.0):
        yield f"ridge {epsilon}, no copies", {"substitutions": 0, "ridge": epsilon}
    yield "exact, no copies", {"estimator": "exact"}
    yield "affine, no copies", {"estimator": "affine"}
    yield "attention alone, no copies", {"ridge": 0.1, "sites": ("attention",)}
    yield "layerwise, no copies", {"ridge": 0.1, "pairing": "layerwise"}
    yield "two_pass, no copies", {"ridge": 0.1, "pairing": "two_pass"}
    yield "header_weight 0.1, no copies", {"ridge": 0.1, "header_weight": 0.1}
    layers = range(10 * blocks // 26, 20 * blocks // 26)  # the depths of the paper's
    for c1 in PAPER_C1:
        yield f"paper, c1 {c1}", tk.paper_recipe(c1=c1, layers=layers)


class Bench:
    """One task's examples and trials, inside and outside, made once for all recipes."""

    def __init__(
        self, model: Any, tokenizer: Any, task: Task, examples: int, seed: int, *, on_held_out: bool = False
    ) -> None:
        rng = random.Random(f"recipes {seed} {task.name}")
        every, (near, far) = inputs(task), split_by_symbols(task)
        seen = [text for text in every if not held_out(text)]
        self.inside = rng.sample(seen, examples)
        fresh = [text for text in every if held_out(text)] if on_held_out else sorted(set(seen) - set(self.inside))
        fresh = rng.sample(fresh, 256)
        self.outside = rng.sample(near, examples)
        far = far if on_held_out else [text for text in far if not held_out(text)]
        far = rng.sample(far, min(128, len(far)))
        self.other_words = word_tokens(tokenizer, without=[*far, *map(task.answer, far)])
        options: Options = {"max_new_tokens": 20}
        answers = [[task.answer(text) for text in texts] for texts in (fresh, far)]
        self.fresh = Trial(model, tokenizer, task.instruction, fresh, answers[0], **options)
        self.far = Trial(model, tokenizer, task.instruction, far, answers[1], divergences=False, **options)

    def row(self, model: Any, tokenizer: Any, task: Task, recipe: Options) -> Options:
        start = time.monotonic()
        recipe = dict(recipe)
        rank, places = recipe.pop("rank", None), recipe.pop("places", None)
        accumulator = ThoughtAccumulator if places is None else functools.partial(ByPlace, places)

        def patch(examples: list[str], **more: Any) -> tk.ThoughtPatch:
            with mock.patch.object(fitting, "ThoughtAccumulator", accumulator):
                found = tk.transmute(model, tokenizer, task.instruction, examples, **recipe, **more)
            return found if rank is None else found.truncate(rank)

        with patch(self.inside).applied(model):
            score = self.fresh.score(model)
        with patch(self.outside, substitutes=self.other_words).applied(model):
            outside, _ = self.far.answer(model)
        return {
            "base": self.fresh.base, "prompted": self.fresh.prompted, "patched": score.accuracy,
            "recovered": round(score.effect.recovered, 5), "recovered_values": round(score.values.recovered, 5),
            "prompted_outside": self.far.prompted, "patched_outside": outside,
            "seconds": round(time.monotonic() - start, 1),
        }  # fmt: skip


def summary(rows: list[Options]) -> Iterator[str]:
    """Means over tasks and seeds, a line per recipe, best outside first."""
    by_recipe: dict[str, list[Options]] = {}
    for row in rows:
        by_recipe.setdefault(row["recipe"], []).append(row)

    def mean(rows: list[Options], name: str, by: str) -> float:
        return sum(float(row[name]) / (float(row[by]) if by else 1) for row in rows) / len(rows)

    figures = {
        recipe: (mean(found, "patched", "prompted"), mean(found, "recovered", ""),
                 mean(found, "patched_outside", "prompted_outside"), len(found))
        for recipe, found in by_recipe.items()
    }  # fmt: skip
    yield f"{'recipe':44} {'patched/prompted':>16} {'recovered':>10} {'outside':>8} {'rows':>6}"
    for recipe, (patched, recovered, outside, count) in sorted(figures.items(), key=lambda item: -item[1][2]):
        yield f"{recipe:44} {patched:16.3f} {recovered:10.4f} {outside:8.3f} {count:6}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--tasks", help="comma-separated; all but the reserved ones unless given")
    parser.add_argument("--recipes", nargs="+", help="only these")
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the examples and inputs")
    parser.add_argument("--final", action="store_true", help="report on the reserved instructions")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    names = [name for name in TASKS if (name in RESERVED_FOR_FINAL_STUDY) == args.final]
    names = args.tasks.split(",") if args.tasks else names
    if not args.final and (reserved := set(names) & set(RESERVED_FOR_FINAL_STUDY)):
        parser.error(f"{sorted(reserved)} are reserved: nothing may be chosen on them")
    output = args.output or RESULTS / ("recipes_final.csv" if args.final else "recipes.csv")
    done: list[Options] = []
    if output.exists():
        with output.open(newline="") as file:
            done = list(csv.DictReader(file))
    seen = {tuple(row[name] for name in COLUMNS[:5]) for row in done}
    model, tokenizer = load(args.model)
    settings = json.loads((args.model / "training.json").read_text())["settings"]
    shown = f"{settings['shape']}, seed {settings['seed']}"
    wanted = [
        (label, options)
        for label, options in recipes(model.config.num_hidden_layers)
        if (label in FINAL or not args.final) and (not args.recipes or label in args.recipes)
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    total = len(names) * len(wanted) * len(args.seeds)
    with output.open("a", newline="") as file, tqdm(total=total) as bar:
        writer = csv.DictWriter(file, COLUMNS)
        if not done:
            writer.writeheader()
        for seed, name in itertools.product(args.seeds, names):
            bench, task = None, TASKS[name]
            for label, options in wanted:
                bar.set_description(f"{name} {label}")
                bar.update()
                key = {"model": shown, "task": name, "recipe": label, "examples": str(args.examples), "seed": str(seed)}
                if tuple(key.values()) in seen:
                    continue
                bench = bench or Bench(model, tokenizer, task, args.examples, seed, on_held_out=args.final)
                row = key | bench.row(model, tokenizer, task, options)
                writer.writerow(row)
                file.flush()
                done.append(row)
    mine = [row for row in done if row["model"] == shown and row["examples"] == str(args.examples)]
    print("\n".join(summary([row for row in mine if row["task"] in names])))


if __name__ == "__main__":
    main()
