"""The paper's experiments on real models, beside the paper, from the results of benchmarks/real/published.py."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from typing import Any

import experiment_tables
from experiment_tables import best_point, curves, results, table

MODELS = {"qwen": "Qwen2.5 Coder 0.5B Instruct", "smol": "SmolLM2 135M Instruct", "gemma": "Gemma 3 270M"}
MEASURED = {
    "addition": ("qwen",), "multiplication": ("qwen",), "translation": ("qwen", "smol", "gemma"),
}  # fmt: skip
# (prompted, patched at its best) in the paper: Figure 1 and Table 2's caption, Figure 2. Addition's prompted accuracy
# is not given; with a patched one of 1 no less than 1 will do.
PAPER = {"addition": (None, 1.0), "multiplication": (1.0, 0.8), "translation": (0.72, 0.6)}
PAPERS_LINES = ("paper", "tuned", "residual")
WANTED = 0.99  # of the prompted accuracy
USABLE = 0.8  # least margin of a judge between right and wrong answers
ROUNDING = 1e-9  # of the product of two shares
UNMEASURED = "Not measured yet."


def folder(model: str, experiment: str) -> str:
    return f"real/{model}/{experiment}"


def is_measured(model: str, experiment: str) -> bool:
    return (experiment_tables.RESULTS / "experiments" / folder(model, experiment) / "results.json").is_file()


def summary() -> str:
    """Best accuracy of each line, and whether the paper's recipe reaches the paper's own share of prompted."""
    rows = [row(model, name) for name, models in MEASURED.items() for model in models if is_measured(model, name)]
    head = [
        "experiment", "model", "paper: prompted", "patched", "here: bare", "prompted", "paper", "tuned", "residual",
        "default", "default / prompted", "the paper's share of prompted", "reproduced",
    ]  # fmt: skip
    if not rows:
        return UNMEASURED
    return "\n\n".join([table(head, rows), *([addition()] if is_measured("qwen", "addition") else [])])


def addition() -> str:
    """Addition from few examples, untuned, beside what was asked of it."""
    found = results(folder("qwen", "addition"))
    last = next(line["points"][-1] for line in found["lines"] if line["name"] == "default")
    share = last["accuracy"] / found["prompted"] if found["prompted"] else 0.0
    return (
        f"Addition on Qwen, default from {last['steps']} examples: {share:.3f} x prompted, at least {WANTED} wanted: "
        f"{'met' if share >= WANTED else 'not met'}. One answer of the {found['inputs']} is "
        f"{1 / found['inputs'] / found['prompted'] if found['prompted'] else 0.0:.3f} x prompted."
    )


def row(model: str, experiment: str) -> list[str | float | None]:
    found = results(folder(model, experiment))
    prompted, (papers_prompted, papers_patched) = found["prompted"], PAPER[experiment]
    best = {line["name"]: best_point(line)["accuracy"] for line in found["lines"]}
    last = next(line["points"][-1] for line in found["lines"] if line["name"] == "default")
    share = papers_patched / (papers_prompted or 1.0)
    able = prompted > found["base"]
    recipe = max(best[line] for line in PAPERS_LINES)
    return [
        experiment, MODELS[model], papers_prompted, papers_patched, found["base"], prompted,
        *(best[line] for line in PAPERS_LINES), f"{last['accuracy']:.3f} from {last['steps']}",
        last["accuracy"] / prompted if prompted else None, share,
        ("yes" if recipe >= share * prompted - ROUNDING else "no") if able else "– (told, it does no better)",
    ]  # fmt: skip


def experiment_on(model: str, experiment: str) -> str:
    """A figure and the tables of one experiment, where it has been measured."""
    if not is_measured(model, experiment):
        return UNMEASURED
    name = folder(model, experiment)
    place = f"../benchmarks/results/experiments/{name}"
    links = ", ".join(f"[{file}]({place}/{file})" for file in ("points.csv", "answers.csv", "results.json"))
    return f"![{experiment}, {MODELS[model]}]({place}/figure.png)\n\n{links}\n\n{curves(name)}"


def judge() -> str:
    """What the judge says of answers that are known, and of each point's answers."""
    base = experiment_tables.RESULTS / "experiments" / "real"
    if not (base / "judge.csv").is_file():
        return UNMEASURED
    with (base / "judge.csv").open(newline="", encoding="utf-8") as file:
        known = [
            [row["asked"], row["answers"], row["count"], float(row["yes"]), float(row["above"])]
            for row in csv.DictReader(file)
        ]
    parts = [table(["to translate", "answers", "count", "yes", "above its threshold"], known), verdict(known)]
    rows = []
    for model in MODELS:
        path = base / model / "translation" / "judged.csv"
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                rows += [
                    [
                        MODELS[model],
                        row["line"],
                        row["steps"],
                        *(float(row[k]) for k in ("yes", "judged", "graded", "agree")),
                    ]
                    for row in csv.DictReader(file)
                ]
    if rows:
        parts.append(
            table(["model", "line", "step", "yes", "above its threshold", "by the reference", "agreement"], rows)
        )
    return "\n\n".join(parts)


def verdict(known: list[list[Any]]) -> str:
    """Whether the judge tells right answers from wrong ones, by the margin between them."""
    found = []
    for asked in dict.fromkeys(row[0] for row in known):
        above = {kind: share for of, kind, *_, share in known if of == asked}
        margin = above["the reference"] - max(share for kind, share in above.items() if kind != "the reference")
        found.append(
            f"Of {asked} the judge takes right answers more often than the kind of wrong ones that it takes most often "
            f"by {margin:.2f}, where 1 would be a perfect judge: "
            + ("it can be used." if margin >= USABLE else "what it says is worth little.")
        )
    return " ".join(found)


PUBLISHED: dict[str, Callable[[], str]] = {
    "published": summary,
    **{
        f"published {model} {name}": partial(experiment_on, model, name)
        for name, models in MEASURED.items()
        for model in models
    },
    "published judge": judge,
}
