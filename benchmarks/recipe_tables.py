"""The tables of docs/recipes.md, from the results of recipes.py, first_block.py and baselines.py."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev

from baselines import means
from markdown_table import markdown

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = {"shipped": "main, seed 0", "small": "small, seed 2", "longer": "main, seed 1"}
GOOD = 0.85  # of the prompted accuracy, outside

Row = dict[str, str]


def read(name: str, model: str = MODELS["shipped"], **fields: str) -> list[Row]:
    """A model's rows in a results file, those with the given fields only."""
    with (RESULTS / name).open(newline="") as file:
        return [row for row in csv.DictReader(file) if {"model": model, **fields}.items() <= row.items()]


def by_recipe(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["recipe"], []).append(row)
    return found


def inside(row: Row) -> float:
    return float(row["patched"]) / float(row["prompted"])


def outside(row: Row) -> float:
    return float(row["patched_outside"]) / float(row["prompted_outside"])


def bold(recipe: str) -> str:
    return f"**{recipe}**" if recipe == "default" else recipe


def development() -> str:
    """Every recipe on the twelve development instructions, the best outside first."""
    lines = []
    recipes, small = (
        by_recipe(read("recipes.csv", MODELS[name], examples="32", seed="0")) for name in ("shipped", "small")
    )
    for recipe, rows in sorted(recipes.items(), key=lambda item: -mean(map(outside, item[1]))):
        recovered = mean(float(row["recovered"]) for row in rows)
        good = sum(outside(row) >= GOOD for row in rows)
        shares = (f"{mean(map(inside, rows)):.3f}", f"{recovered:.4f}", f"{mean(map(outside, rows)):.3f}")
        others = (f"{mean(map(share, small[recipe])):.3f}" for share in (inside, outside))
        lines.append((bold(recipe), *shares, str(good), *others))
    head = (
        "recipe",
        "patched / prompted",
        "recovered",
        "outside",
        f"of 12 at ≥ {GOOD} outside",
        "*small*: patched",
        "outside",
    )
    return markdown(head, lines)


def examples() -> str:
    """The default recipe by the number of examples, on the shipped and the small model."""
    lines = []
    shipped, small = (read("recipes.csv", MODELS[name], recipe="default") for name in ("shipped", "small"))
    for count in sorted({int(row["examples"]) for row in shipped}):
        mine, theirs = ([row for row in rows if row["examples"] == str(count)] for rows in (shipped, small))
        recovered = mean(float(row["recovered"]) for row in mine)
        shares = (f"{mean(map(inside, mine)):.3f}", f"{recovered:.4f}", f"{mean(map(outside, mine)):.3f}")
        others = (f"{mean(map(share, theirs)):.3f}" for share in (inside, outside))
        lines.append((str(count), *shares, *others))
    return markdown(("examples", "patched / prompted", "recovered", "outside", "*small*: patched", "outside"), lines)


def reserved() -> str:
    """The reserved instructions: means over instructions and seeds, and how far the seeds' means scatter."""
    lines = []
    for count in ("32", "8"):
        for recipe, rows in by_recipe(read("recipes_final.csv", examples=count)).items():
            seeds = sorted({row["seed"] for row in rows})
            each = [mean(outside(row) for row in rows if row["seed"] == seed) for seed in seeds]
            scatter = f" ± {stdev(each):.3f}" if len(each) > 1 else ""
            recovered = mean(float(row["recovered"]) for row in rows)
            figures = (f"{mean(map(inside, rows)):.3f}", f"{recovered:.4f}", f"{mean(each):.3f}{scatter}")
            lines.append((bold(recipe), count, str(len(seeds)), *figures))
    head = ("recipe", "examples", "seeds", "patched / prompted", "recovered", "outside ± its scatter over seeds")
    return markdown(head, sorted(lines, key=lambda line: (-int(line[1]), -float(line[5].split()[0]))))


def other_models() -> str:
    """Outside accuracy on the two other models, development and reserved instructions."""
    columns = {}
    for name in ("small", "longer"):
        columns[name] = by_recipe(read("recipes.csv", MODELS[name], examples="32"))
        columns[f"{name}, reserved"] = by_recipe(read("recipes_final.csv", MODELS[name], examples="32"))
    shared = [recipe for recipe in columns["small"] if all(recipe in found for found in columns.values())]
    rows = [(bold(recipe), *(mean(map(outside, found[recipe])) for found in columns.values())) for recipe in shared]
    rows.sort(key=lambda row: -row[1])
    return markdown(("recipe", *columns), [(row[0], *(f"{value:.3f}" for value in row[1:])) for row in rows])


def first_block() -> str:
    """Errors outside of the first attention patch and, in brackets, of u·a = 1, by what the copies hold."""
    with (RESULTS / "first_block.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    def shown(copies: str, model: str) -> str:
        mine = [row for row in rows if (row["copies"], row["model"]) == (copies, model)]
        error, constant = (mean(float(row[name]) for row in mine) for name in ("error", "constant_error"))
        return f"{error:.2f} ({constant:.2f})"

    kinds = dict.fromkeys(row["copies"] for row in rows)
    return markdown(("copies of", *MODELS), [(copies, *(shown(copies, model) for model in MODELS)) for copies in kinds])


def instructions() -> str:
    """Outside accuracy by instruction."""
    found = by_recipe(read("recipes.csv", examples="32", seed="0"))
    shown = ("default", "words", "affine", "no copies", "affine, no copies", "layerwise", "attention alone")
    tasks = [row["task"] for row in found["default"]]
    lines = []
    for recipe in shown:
        values = {row["task"]: outside(row) for row in found[recipe]}
        lines.append((recipe, *(f"{values[task]:.2f}" for task in tasks)))
    return markdown(("recipe", *tasks), lines)


def baselines() -> str:
    """What else the same examples can be made into, on the reserved instructions."""
    with (RESULTS / "baselines.csv").open(newline="") as file:
        lines = means(list(csv.DictReader(file)))
    return markdown(
        ("made of the same 32 examples", "accuracy / prompted", "recovered", "outside"),
        [(name, f"{near:.3f}", f"{recovered:.4f}", f"{far:.3f}") for name, near, recovered, far in lines],
    )


RECIPES: dict[str, Callable[[], str]] = {
    "development": development, "examples": examples, "reserved": reserved, "baselines": baselines,
    "other models": other_models, "first block": first_block, "instructions": instructions,
}  # fmt: skip
