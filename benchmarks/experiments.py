"""Runs the experiment commands on the shipped model and rewrites the tables of docs/experiments.md from their results.

    python benchmarks/experiments.py [--only addition,composition] [--tables]

Results go to benchmarks/results/experiments/NAME. An experiment that was stopped goes on from its journal, which is
removed when it is finished; --tables runs nothing. `make experiments` does all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from thought_kernels.cli import app

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "experiments", ROOT / "docs" / "experiments.md"
CURVES = ("addition", "multiplication", "translation")
NAMES = (*CURVES, "composition", "knowledge")
REACHED = 0.97  # of the prompted accuracy


def run(name: str) -> None:
    """One experiment; its journal stays only if it does not finish."""
    folder, start = RESULTS / name, time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    code = app(["experiment", name, "--output", str(folder)], standalone_mode=False)
    if code:
        sys.exit(code)
    (folder / "journal.jsonl").unlink(missing_ok=True)
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


def table(head: list[str], rows: list[list[Any]], names: int = 1) -> str:
    """Markdown, numbers to the right of the names; fractions with three digits, None as a dash."""
    lines = [head, ["---"] * names + ["---:"] * (len(head) - names)]
    for row in rows:
        lines.append(["–" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def curves(found: dict[str, Any]) -> str:
    """Each line's best and last point, the answers of the paper's table, and how c1 was chosen."""
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
    parts.append(table(["line", "step", "query", "with the instruction", "patched"], answers, names=5))
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


def composition(found: dict[str, Any]) -> str:
    """One patch and its negation; a second one added; the second instruction on the first one's answer."""
    alone = table(
        ["task", "bare", "told", "patched", "-patch: answers as bare", "told, -patch", "effect taken back"],
        [[row[key] for key in ("name", "base", "prompted", "patched", "negated_repeats", "negated_prompted",
                               "cancelled")] for row in found["alone"]],
    )  # fmt: skip
    together = table(
        ["task", "with", "own patch", "sum", "in turn", "KL lost", "cosine", "disturbance"],
        [[*(row[key] for key in ("name", "other", "patched", "added", "in_turn", "kl_lost")),
          row["predicted"]["cosine"], row["predicted"]["disturbance"]] for row in found["together"]], names=2,
    )  # fmt: skip
    both = table(
        ["first", "then", "sum", "in turn", "told both"],
        [[row[key] for key in ("first", "second", "added", "in_turn", "prompted")] for row in found["both"]], names=2,
    )  # fmt: skip
    shown = ", ".join(f"{n} {'–' if rho is None else f'{rho:.2f}'}" for n, rho in found["correlations"].items())
    return "\n\n".join([
        alone, together, f"Spearman's ρ of each prediction with the KL lost, {len(found['together'])} ordered pairs: "
        f"{shown}.", both,
    ])  # fmt: skip


def knowledge(found: dict[str, Any]) -> str:
    """Shares of questions answered, for the paragraph and for the lexicon."""
    columns = ("fitted", "seen", "asked", "base", "prompted", "patched", "recovered")
    rows = [[name, *(report[column] for column in columns)] for name, report in found.items()]
    return "\n\n".join([
        table(["facts", "fitted on", "of which answered", "others asked", "bare", "prompted", "patched",
               "recovered effect"], rows),
        *(f"{name}: {report['verdict']}" for name, report in found.items()),
    ])  # fmt: skip


def rewrite(page: str) -> str:
    """The page with every table that has results made anew, between its two markers."""
    for name in NAMES:
        path = RESULTS / name / "results.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            made = {"composition": composition, "knowledge": knowledge}.get(name, curves)(found)
            before, _, rest = page.partition(f"<!-- {name} -->\n")
            _, marker, after = rest.partition(f"<!-- end of {name} -->")
            if not marker:
                raise ValueError(f"experiments: {PAGE} must hold the two markers of {name}, got one or none")
            page = f"{before}<!-- {name} -->\n{made}\n{marker}{after}"
    return page


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(NAMES))
    parser.add_argument("--tables", action="store_true", help="run nothing, only rewrite the tables")
    settings = parser.parse_args()
    unknown = set(settings.only.split(",")) - set(NAMES)
    if unknown:
        parser.error(f"--only must be among {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    for name in () if settings.tables else settings.only.split(","):
        run(name)
    PAGE.write_text(rewrite(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
