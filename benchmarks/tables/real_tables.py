"""The tables of the README and of docs/real_models.md, from the rows of real/run.py and real/given.py."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, median

from markdown_table import markdown

RESULTS = Path(__file__).resolve().parents[1] / "results"
MODELS = {"gemma": "Gemma 3 270M", "smol": "SmolLM2 135M Instruct", "qwen": "Qwen2.5 Coder 0.5B Instruct"}
KINDS = {
    "word": "word tasks, eight demonstrations", "instruction": "natural instructions", "system": "long system prompts",
    "arithmetic": "arithmetic",
}  # fmt: skip
# What a mean over tasks and seeds must reach from 32 inputs: the recovered effect, and the patched accuracy over the
# prompted one. From 8 inputs each may be FEWER lower.
WANTED = {
    ("word", "gemma"): (0.97, 0.97), ("instruction", "smol"): (0.94, None), ("instruction", "qwen"): (0.95, None),
    ("system", "qwen"): (0.90, None), ("arithmetic", "qwen"): (0.99, 0.99),
}  # fmt: skip
FEWER = 0.05
ALONE = 0.95  # of what 32 inputs recover, from the prompt alone

Row = dict[str, str]


def read(**fields: str) -> list[Row]:
    """The rows with the given fields; of rows that were written twice the later ones."""
    found: dict[tuple[str, ...], Row] = {}
    names = ("model", "task", "seed", "inputs", "method", "recipe", "rate", "steps", "device")
    with (RESULTS / "real.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if fields.items() <= row.items():
                found[tuple(row[name] for name in names)] = row
    return list(found.values())


def patches(**fields: str) -> list[Row]:
    """Rows of the default recipe."""
    return read(method="patch", recipe="default", **fields)


def average(rows: Iterable[Row], name: str) -> float:
    return mean(float(row[name]) for row in rows)


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def shown(rows: list[Row], name: str) -> str:
    return f"{average(rows, name):.3f}" if all(row[name] for row in rows) else "–"


def summary() -> str:
    """Each kind of task on each model: means over tasks and seeds, beside what they must reach."""
    lines = []
    for (kind, model, reserved, inputs), rows in grouped(patches(), "kind", "model", "reserved", "inputs").items():
        recovered, share = WANTED[kind, model]
        if inputs == "8":
            recovered, share = recovered - FEWER, share and share - FEWER
        if inputs == "0":
            recovered = ALONE * average(real_inputs(rows), "recovered")
        worst = min(average(mine, "recovered") for mine in grouped(rows, "task").values())
        ratio = average(rows, "patched") / average(rows, "prompted") if share else None
        met = average(rows, "recovered") >= recovered and (ratio is None or ratio >= share)
        lines.append((
            KINDS[kind], MODELS[model], "reserved" if reserved == "True" else "development", inputs,
            str(len(grouped(rows, "task"))), *(shown(rows, name) for name in ("bare", "prompted", "patched")),
            f"{average(rows, 'recovered'):.3f}", f"{worst:.3f}",
            f"{recovered:.2f}" + (f", accuracy {share:.2f} of prompted" if share else ""), "yes" if met else "no",
            f"{median(float(row['seconds']) for row in rows):.0f}",
        ))  # fmt: skip
    head = (
        "kind", "model", "half", "inputs", "tasks", "bare", "prompted", "patched", "recovered", "worst task", "wanted",
        "met", "seconds",
    )  # fmt: skip
    order = list(KINDS.values())
    return markdown(head, sorted(lines, key=lambda line: (order.index(line[0]), line[1:3], -int(line[3]))))


def real_inputs(rows: list[Row]) -> list[Row]:
    """The rows from 32 inputs of the same models, tasks and seeds."""
    return [
        row for mine in rows for row in patches(inputs="32", **{name: mine[name] for name in ("model", "task", "seed")})
    ]


def reserved() -> str:
    """Each kind of task on each model, from 32 inputs, on the half that no choice was made on."""
    lines = []
    found = grouped(patches(reserved="True", inputs="32"), "kind", "model")
    for (kind, model), rows in sorted(found.items(), key=lambda item: (list(KINDS).index(item[0][0]), item[0][1])):
        worst = min(average(mine, "recovered") for mine in grouped(rows, "task").values())
        lines.append((
            KINDS[kind], MODELS[model], str(len(grouped(rows, "task"))),
            *(shown(rows, name) for name in ("bare", "prompted", "patched")),
            f"{average(rows, 'recovered'):.3f}", f"{worst:.3f}",
        ))  # fmt: skip
    head = ("prompt", "model", "tasks", "accuracy: bare", "prompted", "patched", "recovered", "worst task")
    return markdown(head, lines)


def tasks() -> str:
    """Every task at 32 inputs, means over seeds; a star marks the reserved ones."""
    lines = []
    for (model, _, task), rows in grouped(patches(inputs="32"), "model", "kind", "task").items():
        recovered = [float(row["recovered"]) for row in rows]
        star = r" \*" if rows[0]["reserved"] == "True" else ""
        lines.append((
            task + star, MODELS[model], *(shown(rows, name) for name in ("bare", "prompted", "patched")),
            f"{mean(recovered):.3f}", f"{min(recovered):.3f} to {max(recovered):.3f}",
            *(f"{median(float(row[name]) for row in rows):.1f}" for name in ("seconds", "generation")),
        ))  # fmt: skip
    head = ("task", "model", "bare", "prompted", "patched", "recovered", "over seeds", "seconds", "writing")
    return markdown(head, lines)


RIVALS = {
    "patch": "patch", "mean-difference": "mean-difference vector", "function-vector": "function vector",
    "task-vector": "task vector", "principal-direction": "principal direction", "probe-direction": "probe direction",
    "rank-one": "rank-one edit", "paper": "the paper's recipe",
}  # fmt: skip


def chosen(rows: list[Row]) -> Row:
    """Of a LoRA's rates the one of best effect on the rows that it learned from, with the seconds of all."""
    row = max(rows, key=lambda row: float(row["fitted"] or "-inf"))
    return {**row, "seconds": str(sum(float(row["seconds"]) for row in rows))}


def loras() -> list[Row]:
    """LoRAs from 32 inputs at each checkpoint."""
    rows = [row for row in read(inputs="32") if row["steps"]]
    return [chosen(mine) for mine in grouped(rows, "model", "task", "seed", "steps").values()]


def rivals() -> str:
    """What is made without training from 32 inputs, means over the tasks and seeds on which all were measured."""
    rows = [row for row in read(inputs="32") if row["method"] in RIVALS and row["recipe"] in ("default", "")]
    return compared(rows) or "No rival has been measured yet."


def trained() -> str:
    """The patch and the LoRAs from 32 inputs, means over the tasks and seeds on which both were measured."""
    rows = patches(inputs="32") + [{**row, "method": f"LoRA, {row['steps']} steps"} for row in loras()]
    return compared(rows) or "No LoRA has been trained yet."


def compared(rows: list[Row]) -> str:
    """Every method by kind and model, and over all of them."""
    groups = sorted(
        grouped(rows, "kind", "model").items(), key=lambda item: (list(KINDS).index(item[0][0]), item[0][1])
    )
    lines, measured = [], []
    for (kind, model), mine in groups:
        kept = on_the_same(mine)
        measured += kept
        lines += [(KINDS[kind], MODELS[model], *line) for line in by_method(kept)]
    common = on_the_same(measured)
    if len({(row["kind"], row["model"]) for row in common}) > 1:  # else it is a group that stands there already
        lines += [("all", "all", *line) for line in by_method(common)]
    head = (
        "kind", "model", "method", "tasks and seeds", "recovered", "accuracy of prompted", "drift", "seconds", "memory",
    )  # fmt: skip
    return markdown(head, lines) if lines else ""


def on_the_same(rows: list[Row]) -> list[Row]:
    """The rows of models, tasks and seeds on which every method was measured; none where there is one method."""
    methods = {row["method"] for row in rows}
    measured = grouped(rows, "model", "task", "seed").values()
    return [row for mine in measured if len({row["method"] for row in mine}) == len(methods) > 1 for row in mine]


def by_method(rows: list[Row]) -> list[tuple[str, ...]]:
    """A line for each method: recovered effect, accuracy, drift, seconds, memory."""
    order = [*RIVALS, *(f"LoRA, {steps} steps" for steps in (25, 50, 100, 200))]
    lines = []
    for (method,), mine in sorted(grouped(rows, "method").items(), key=lambda item: order.index(item[0][0])):
        judged = all(row["patched"] for row in mine)
        memory = [float(row["peak_mib"]) for row in mine if row["peak_mib"]]
        lines.append((
            RIVALS.get(method, method), str(len(mine)), f"{average(mine, 'recovered'):.3f}",
            f"{average(mine, 'patched') / average(mine, 'prompted'):.2f}" if judged else "–", shown(mine, "drift"),
            f"{median(float(row['seconds']) for row in mine):.0f}",
            f"{median(memory):.0f} MiB" if len(memory) == len(mine) else "–",
        ))  # fmt: skip
    return lines


def rival() -> str:
    """The patch, and a LoRA trained on the same rows, at each checkpoint."""
    lines = []
    for (model, task, seed), rows in grouped(loras(), "model", "task", "seed").items():
        ours = patches(model=model, task=task, seed=seed, inputs="32")
        if not ours:
            continue
        ordered = sorted(rows, key=lambda row: int(row["steps"]))
        cells = [f"{float(row['recovered']):.3f} in {float(row['seconds']):.0f} s" for row in [*ours, *ordered]]
        star = r" \*" if rows[0]["reserved"] == "True" else ""
        lines.append((task + star, MODELS[model], *cells))
    head = ("task", "model", "patch", "LoRA, 25 steps", "50", "100", "200")
    return markdown(head, lines) if lines else "No LoRA has been trained yet."


def recipes() -> str:
    """Other recipes beside the default on development tasks: the recovered effect from 32 inputs, means over seeds."""
    rows = read(method="patch", reserved="False", inputs="32")
    others = {(row["model"], row["task"], row["seed"]) for row in rows if row["recipe"] != "default"}
    rows = [row for row in rows if (row["model"], row["task"], row["seed"]) in others]
    columns = sorted({row["recipe"] for row in rows}, key=lambda recipe: (recipe != "default", len(recipe), recipe))
    lines = []
    for (model, task), mine in grouped(rows, "model", "task").items():
        found = grouped(mine, "recipe")
        cells = (f"{average(found[recipe,], 'recovered'):.3f}" if (recipe,) in found else "–" for recipe in columns)
        lines.append((f"{task}, {MODELS[model].split()[0]}", *cells))
    head = ("task", *(recipe if recipe == "default" else f"`{recipe}`" for recipe in columns))
    return markdown(head, lines)


def given() -> str:
    """transmute from given completions: seconds, and peak memory beside the model's own forward."""
    with (RESULTS / "real_given.csv").open(newline="") as file:
        lines = [
            (MODELS[row["model"]], row["task"], row["inputs"], row["tokens"], f"{float(row['seconds']):.1f}",
             row["threads"], f"{row['peak_mib']} MiB", f"{row['forward_mib']} MiB")
            for row in csv.DictReader(file)
        ]  # fmt: skip
    return markdown(("model", "task", "inputs", "tokens", "seconds", "threads", "peak", "peak of one forward"), lines)


REAL: dict[str, Callable[[], str]] = {
    "real reserved": reserved,
    "real summary": summary,
    "real tasks": tasks,
    "real rivals": rivals,
    "real trained": trained,
    "real rival": rival,
    "real recipes": recipes,
    "real given": given,
}
