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
RIGHT = 0.5  # least grade of an answer that counts as right where it is so or not
GRADED = {"words_in_common": "F1"}  # scorers whose grades lie between
MOST_SHOWN = 3  # answers of a kind and line; all are in answers.csv
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
    """Each line's best and last point, who was right there, the answers of the paper's table, and how c1 was chosen."""
    found = results(name)
    prompted, rows, answers, swept = found["prompted"], [], [], []
    for line in found["lines"]:
        best, last = best_point(line), line["points"][-1]
        enough = [point["steps"] for point in line["points"] if point["accuracy"] >= REACHED * prompted > 0]
        rows.append([
            label(line), *(value for point in (best, last) for value in (point["accuracy"], at(point))),
            min(enough, default=None),
        ])  # fmt: skip
        nearest = [min(line["samples"], key=lambda s, n=n: abs(s["steps"] - n))["steps"] for n in found["sampled"]]
        answers += [
            [line["name"], at(sample), *(quoted(sample[k]) for k in ("query", "prompted", "patched"))]
            for sample in line["samples"] if sample["steps"] in nearest
        ]  # fmt: skip
        if line["sweep"]:
            swept.append(sweep(line))
    reached = f"first step with {REACHED} x prompted"
    return "\n\n".join([
        f"Prompted {prompted:.3f}, bare {found['base']:.3f}, on {found['inputs']} inputs.",
        table(["line", "best", "at step (effective c₁)", "last", "at step (effective c₁)", reached], rows),
        sides(name, found["settings"]["match"]),
        table(["line", "step (effective c₁)", "query", "with the instruction", "patched"], answers),
        *swept,
    ])  # fmt: skip


def sweep(line: dict[str, Any]) -> str:
    """What c1 was chosen from, and whether a better one may lie beyond what was tried."""
    tried = ", ".join(
        f"{c1:g}: {accuracy:.2f} ({'–' if recovered is None else f'{recovered:.2f}'})"
        for c1, accuracy, recovered in line["sweep"]
    )
    at_an_edge = line["c1"] in (line["sweep"][0][0], line["sweep"][-1][0])
    return f"c₁ of {line['name']}: accuracy (recovered effect) on other inputs, {tried}." + (
        " The one chosen is at the edge of what was tried." if at_an_edge else ""
    )


def best_point(line: dict[str, Any]) -> Any:
    """A line's first point of highest accuracy."""
    return max(line["points"], key=lambda point: (point["accuracy"], -point["steps"]))


def at(point: dict[str, Any]) -> str:
    """A point's step with what the constant divisor makes of c1 there."""
    return str(point["steps"]) + ("" if point["effective_c1"] is None else f" ({point['effective_c1']:.3g})")


def quoted(text: str, most: int = 100) -> str:
    """What a model wrote, in a cell of a table."""
    text = text.strip().replace("\n", " ⏎ ").replace("`", "'").replace("|", "\\|")
    return f"`{text if len(text) <= most else text[:most] + '…'}`" if text else "–"


def sides(name: str, match: str) -> str:
    """At each line's best and last point: how often the prompted and the patched model were right, or graded at least
    RIGHT, and the answers where the patched one alone was."""
    with (RESULTS / "experiments" / name / "answers.csv").open(newline="", encoding="utf-8") as file:
        answers = list(csv.DictReader(file))
    points: dict[tuple[str, str], list[tuple[bool, bool]]] = {}
    for row in answers:
        right = (float(row["prompted_grade"]) >= RIGHT, float(row["patched_grade"]) >= RIGHT)
        points.setdefault((row["line"], row["steps"]), []).append(right)
    counts = [
        [*point, *(found.count(sides) for sides in ((True, True), (False, True), (True, False), (False, False)))]
        for point, found in points.items()
    ]
    right = f"{GRADED[match]} at least {RIGHT}:" if match in GRADED else "right:"
    parts = [table(["line", "step", f"{right} both", "patched alone", "prompted alone", "neither"], counts)]
    last = dict(points.keys())  # of each line, as they stand in the file
    alone = [
        [row["line"], row["steps"], *(quoted(row[k]) for k in ("query", "prompted", "patched"))]
        for row in answers
        if row["steps"] == last[row["line"]]
        and float(row["prompted_grade"]) < RIGHT <= float(row["patched_grade"])
    ]  # fmt: skip
    if alone:
        shown = {line: [row for row in alone if row[0] == line][:MOST_SHOWN] for line in last}
        kind = f"Patched alone with {right.rstrip(':')}" if match in GRADED else "Prompted wrong, patched right"
        parts.append(f"{kind}, at the lines' last points ({MOST_SHOWN} of a line at most):")
        head = ["line", "step", "query", "with the instruction", "patched"]
        parts.append(table(head, [row for rows in shown.values() for row in rows]))
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
