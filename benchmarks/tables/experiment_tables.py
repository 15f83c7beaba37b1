"""The tables of docs/experiments.md and of docs/spectral_models.md's predictions, from the experiments' results."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from markdown_table import markdown

RESULTS = Path(__file__).resolve().parents[1] / "results"
CURVES = ("addition", "multiplication", "translation")
REACHED = 0.97  # of the prompted accuracy
PREDICTIONS = {
    "felt": "`felt`", "felt_largest": "largest `felt` of a site", "read": "overlap of what is read",
    "write": "overlap of what is written", "alignment": "alignment", "norm": "norm of the other patch alone",
}  # fmt: skip


def results(name: str) -> Any:
    return json.loads((RESULTS / "experiments" / name / "results.json").read_text(encoding="utf-8"))


def shown(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def table(head: list[str], rows: list[list[Any]]) -> str:
    return markdown(head, [[shown(value) for value in row] for row in rows])


def curves(name: str) -> str:
    """Each line's best and last point, the answers of the paper's table, and how c1 was chosen."""
    found = results(name)
    prompted, rows = found["prompted"], []
    for line in found["lines"]:
        points = line["points"]
        best = max(points, key=lambda point: (point["accuracy"], -point["steps"]))
        enough = [point["steps"] for point in points if point["accuracy"] >= REACHED * prompted > 0]
        rows.append([
            label(line), best["accuracy"], best["steps"], points[-1]["accuracy"], points[-1]["steps"],
            min(enough, default=None),
        ])  # fmt: skip
    parts = [
        f"Prompted {prompted:.3f}, bare {found['base']:.3f}, on {found['inputs']} inputs that training has not seen.",
        table(["line", "best", "at step", "last", "at step", f"first step with {REACHED} x prompted"], rows),
    ]
    answers = []
    for line in found["lines"]:
        steps = [min(line["samples"], key=lambda s, n=n: abs(s["steps"] - n))["steps"] for n in found["sampled"]]
        for sample in line["samples"]:
            if sample["steps"] in steps:
                answers.append([line["name"], sample["steps"], *(sample[k] for k in ("query", "prompted", "patched"))])
    parts.append(table(["line", "step", "query", "with the instruction", "patched"], answers))
    if found["sweep"]:
        parts.append("c₁ tuned: accuracy (recovered effect) on other inputs, " + ", ".join(
            f"{c1:g}: {accuracy:.2f} ({'–' if recovered is None else f'{recovered:.2f}'})"
            for c1, accuracy, recovered in found["sweep"]
        ) + ".")  # fmt: skip
    return "\n\n".join(parts)


def label(line: dict[str, Any]) -> str:
    """A line's name with its scales."""
    if line["layers"] is None:
        return "default"
    scales = f"c₁ = {line['c1']:g}" + (f", c₂ = {line['c2']:g}" if line["c2"] else "")
    return f"{line['name']}: {scales}, blocks {line['layers'][0]}-{line['layers'][-1]}"


def composition() -> str:
    """One patch and its negation; a second one added; the second instruction on the first one's answer."""
    found = results("composition")
    alone = table(
        ["task", "bare", "told", "patched", "-patch: answers as bare", "told, -patch", "effect taken back"],
        [[row[key] for key in ("name", "base", "prompted", "patched", "negated_repeats", "negated_prompted",
                               "cancelled")] for row in found["alone"]],
    )  # fmt: skip
    together = table(
        ["task", "with", "own patch", "sum", "in turn", "KL lost", "cosine", "disturbance"],
        [[*(row[key] for key in ("name", "other", "patched", "added", "in_turn", "kl_lost")),
          row["predicted"]["cosine"], row["predicted"]["disturbance"]] for row in found["together"]],
    )  # fmt: skip
    both = table(
        ["first", "then", "sum", "in turn", "told both"],
        [[row[key] for key in ("first", "second", "added", "in_turn", "prompted")] for row in found["both"]],
    )  # fmt: skip
    rhos = ", ".join(f"{n} {'–' if rho is None else f'{rho:.2f}'}" for n, rho in found["correlations"].items())
    return "\n\n".join([
        alone, together, f"Spearman's ρ of each prediction with the KL lost, {len(found['together'])} ordered pairs: "
        f"{rhos}.", both,
    ])  # fmt: skip


def knowledge() -> str:
    """Shares of questions answered, for the paragraph and for the lexicon."""
    found = results("knowledge")
    columns = ("fitted", "seen", "asked", "base", "prompted", "patched", "recovered")
    rows = [[name, *(report[column] for column in columns)] for name, report in found.items()]
    return "\n\n".join([
        table(["facts", "fitted on", "of which answered", "others asked", "bare", "prompted", "patched",
               "recovered effect"], rows),
        *(f"{name}: {report['verdict']}" for name, report in found.items()),
    ])  # fmt: skip


def interference() -> str:
    """The correlations with the divergence gained as a table, and how sure that of `felt` is."""
    with (RESULTS / "interference_correlations.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    found = {(line["prediction"], line["strength"]): line for line in lines if line["measure"] == "divergence"}
    strengths = sorted({strength for _, strength in found}, key=float)

    def digits(text: str) -> str:
        return f"{float(text):.2f}" if text else "–"

    rows = []
    for name, text in PREDICTIONS.items():
        cells = [found[name, strength] for strength in strengths]
        rows.append([text, *(f"{digits(cell['spearman'])} ({digits(cell['within_task'])})" for cell in cells)])
    intervals = " and ".join(
        f"{digits(found['felt', s]['low'])} to {digits(found['felt', s]['high'])} at {s} x" for s in strengths
    )
    return (
        table(["prediction", *(f"other patch x {strength}" for strength in strengths)], rows)
        + f"\n\nResampling the instructions gives intervals for `felt` of {intervals}."
    )


EXPERIMENTS: dict[str, Callable[[], str]] = {
    **{name: partial(curves, name) for name in CURVES},
    "composition": composition,
    "knowledge": knowledge,
    "interference": interference,
}
