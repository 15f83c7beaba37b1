"""Which recipe: the table that transmute's defaults were read off.

    python benchmarks/recipes.py --list                         # the grid's labels, in the order of measurement
    python benchmarks/recipes.py --seeds 0 [--model DIR] [--recipes LABEL ...] [--tasks a,b,...] [--examples 32]
    python benchmarks/recipes.py --final [--seeds 0 1] [--model DIR] ...        # a few rows, reserved instructions
    python benchmarks/recipes.py --output FILE.csv ...                          # elsewhere than benchmarks/results

Every row of the grid is fitted on development instructions only, never on tasks.RESERVED_FOR_FINAL_STUDY, and judged
twice: on fresh inputs of the examples' range, and outside it, on inputs none of whose numbers or words any example
held, nor any of its copies: where these hold words, the words are drawn from others. Neither uses the inputs held out
from training, which the demonstration reports on. `--final` is the report on the reserved instructions, of a few rows
of the grid, on inputs held out from training.

A row is measured on all instructions before the next one is begun, in the order of `--list` or of `--recipes`; rows are
written as they are finished, a run that was stopped goes on where it was, and rows that the file holds stay.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import candidates
from tqdm import tqdm

import thought_kernels as tk
from thought_kernels.demo import CHECKPOINT
from thought_kernels.demo.tasks import RESERVED_FOR_FINAL_STUDY, TASKS, Task, held_out, inputs, split_by_symbols
from thought_kernels.evaluate.trial import Trial
from thought_kernels.models.load import load
from thought_kernels.transmute.substitution import WORDS, resolved_substitutes, without_words_of
from thought_kernels.transmute.transmute import RIDGE_WITH_SUBSTITUTIONS

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("model", "task", "recipe", "examples", "seed", "base", "prompted", "patched", "recovered",
           "recovered_values", "prompted_outside", "patched_outside", "seconds")  # fmt: skip
PAPER_C1 = (0.015, 1.5, 5.0, 15.0)
FINAL = (
    "default",
    "words",
    "words of weight 2, ridge 0.01",
    "no copies",
    "affine",
    "words, affine",
    "affine, no copies",
    *(f"paper, c1 {c1}" for c1 in PAPER_C1),
)

Options = dict[str, Any]


def recipes(blocks: int) -> Iterator[tuple[str, Options]]:
    """The default and changes to it, each with what transmute is told.

    Beside transmute's own options: `words`, to make copies of words instead of random vectors; `rank`, to truncate the
    patch to; `change`, see candidates.py. "No copies" and the rows named after it have the
    ridge that is best without copies on the shipped model, and `affine` one of 0.1, unless they say otherwise.
    """
    usual: Options = {"estimator": "ridge", "ridge": RIDGE_WITH_SUBSTITUTIONS, "substitutions": 8}
    yield "default", {}
    yield "no copies", {"substitutions": 0, "ridge": 0.1}
    yield "words", {"words": True}
    # What suits words best, as the default's weight and ridge suit vectors.
    lighter = candidates.with_constant("COPIES_SHARE", 2.0)
    yield "words of weight 2, ridge 0.01", usual | {"ridge": 0.01, "words": True, "change": lighter}
    yield "affine", usual | {"estimator": "affine", "ridge": 0.1}
    yield "affine, ridge 0.01", usual | {"estimator": "affine", "ridge": 0.01}
    yield "affine, no copies", {"estimator": "affine"}
    yield "words, affine", usual | {"estimator": "affine", "ridge": 0.1, "words": True}
    yield "affine in block 0's attention only", {"change": candidates.by_place(_affine_in_first_attention)}
    for copies in (2, 4, 16):
        yield f"{copies} copies", usual | {"substitutions": copies}
    for label, change in candidates.COPIES.items():
        yield label, {"change": change}
    for epsilon in (0.001, 0.003, 0.01, 0.03, 0.1):
        if epsilon != RIDGE_WITH_SUBSTITUTIONS:
            yield f"ridge {epsilon}", usual | {"ridge": epsilon}
    for at_attention, at_mlp in ((0.01, 0.003), (0.03, 0.003), (0.003, 0.001), (0.003, 0.01)):
        yield f"ridge {at_attention} at attention, {at_mlp} at mlp", {"change": _at_sites(at_attention, at_mlp)}
    yield "exact", usual | {"estimator": "exact"}
    yield "automatic ridge", {"ridge": "auto"}
    yield "automatic ridge and scale", {"ridge": "auto", "scale": "auto"}
    for label, change in candidates.CANDIDATES.items():
        yield label, {"change": change}
    yield "words, own answers", {"words": True, "change": candidates.with_own_answers}
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
    for epsilon in (0.01, 0.03, 0.3, 1.0):
        yield f"ridge {epsilon}, no copies", {"substitutions": 0, "ridge": epsilon}
    yield "exact, no copies", {"estimator": "exact"}
    yield "attention alone, no copies", {"ridge": 0.1, "sites": ("attention",)}
    yield "layerwise, no copies", {"ridge": 0.1, "pairing": "layerwise"}
    yield "two_pass, no copies", {"ridge": 0.1, "pairing": "two_pass"}
    yield "header_weight 0.1, no copies", {"ridge": 0.1, "header_weight": 0.1}
    layers = range(10 * blocks // 26, 20 * blocks // 26)  # the depths of the paper's
    for c1 in PAPER_C1:
        yield f"paper, c1 {c1}", tk.paper_recipe(c1=c1, layers=layers)


def _affine_in_first_attention(layer: int, site: str) -> tuple[str, float]:
    # What enters there is the instruction itself.
    return ("affine", 0.1) if (layer, site) == (0, "attention") else ("ridge", RIDGE_WITH_SUBSTITUTIONS)


def _at_sites(at_attention: float, at_mlp: float) -> candidates.Change:
    return candidates.by_place(lambda _, site: ("ridge", at_attention if site == "attention" else at_mlp))


class Bench:
    """One task's examples and trials, inside and outside, made once for all recipes."""

    def __init__(
        self, model: Any, tokenizer: Any, task: Task, examples: int, seed: int, *, on_held_out: bool = False
    ) -> None:
        self.model, self.tokenizer, self.task = model, tokenizer, task
        rng = random.Random(f"recipes {seed} {task.name}")
        every, (near, far) = inputs(task), split_by_symbols(task)
        seen = [text for text in every if not held_out(text)]
        self.inside = rng.sample(seen, examples)
        fresh = [text for text in every if held_out(text)] if on_held_out else sorted(set(seen) - set(self.inside))
        fresh = rng.sample(fresh, 256)
        self.outside = rng.sample(near, examples)
        far = far if on_held_out else [text for text in far if not held_out(text)]
        far = rng.sample(far, min(128, len(far)))
        words = resolved_substitutes(WORDS, tokenizer, model.config.vocab_size) or ()
        self.other_words = without_words_of(tokenizer, words, [*far, *map(task.answer, far)])
        self.outside_tokens = self._tokens(far) - self._tokens(self.outside)  # but the space between numbers
        options: Options = {"max_new_tokens": 20}
        answers = [[task.answer(text) for text in texts] for texts in (fresh, far)]
        self.fresh = Trial(model, tokenizer, task.instruction, fresh, answers[0], **options)
        self.far = Trial(model, tokenizer, task.instruction, far, answers[1], divergences=False, **options)

    def _tokens(self, texts: list[str]) -> set[int]:
        every = [*texts, *map(self.task.answer, texts)]
        return {index for text in every for index in self.tokenizer(text, add_special_tokens=False)["input_ids"]}

    def row(self, recipe: Options) -> Options:
        start = time.monotonic()
        recipe = dict(recipe)
        words, rank, change = recipe.pop("words", False), recipe.pop("rank", None), recipe.pop("change", None)

        def patch(examples: list[str], substitutes: list[int] | str) -> tk.ThoughtPatch:
            options = recipe | {"substitutes": substitutes} if words else recipe
            with change(self) if change else contextlib.nullcontext():
                found = tk.transmute(self.model, self.tokenizer, self.task.instruction, examples, **options)
            return found if rank is None else found.truncate(rank)

        with patch(self.inside, WORDS).applied(self.model):
            score = self.fresh.score(self.model)
        with patch(self.outside, self.other_words).applied(self.model):
            outside, _ = self.far.answer(self.model)
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
    parser.add_argument("--recipes", nargs="+", help="only these, in this order")
    parser.add_argument("--list", action="store_true", help="print the labels and leave")
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
    grid = dict(recipes(model.config.num_hidden_layers))
    wanted = args.recipes or [label for label in grid if label in FINAL or not args.final]
    if args.list:
        print("\n".join(wanted))
        return
    if unknown := [label for label in wanted if label not in grid]:
        parser.error(f"{unknown} are no rows of the grid; --list prints them")
    settings = json.loads((args.model / "training.json").read_text())["settings"]
    shown = f"{settings['shape']}, seed {settings['seed']}"
    output.parent.mkdir(parents=True, exist_ok=True)
    benches: dict[tuple[int, str], Bench] = {}
    with output.open("a", newline="") as file, tqdm(total=len(names) * len(wanted) * len(args.seeds)) as bar:
        writer = csv.DictWriter(file, COLUMNS)
        if not done:
            writer.writeheader()
        for seed, label, name in itertools.product(args.seeds, wanted, names):
            bar.set_description(f"{name} {label}")
            bar.update()
            key = {"model": shown, "task": name, "recipe": label, "examples": str(args.examples), "seed": str(seed)}
            if tuple(key.values()) in seen:
                continue
            if (seed, name) not in benches:
                benches[seed, name] = Bench(model, tokenizer, TASKS[name], args.examples, seed, on_held_out=args.final)
            row = key | benches[seed, name].row(grid[label])
            writer.writerow(row)
            file.flush()
            done.append(row)
    mine = [row for row in done if row["model"] == shown and row["examples"] == str(args.examples)]
    print("\n".join(summary([row for row in mine if row["task"] in names])))


if __name__ == "__main__":
    main()
