"""The tables of docs/spectral_models.md on patches of pretrained models, from the rows of real/foretell.py."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median

from inspect_tables import code
from markdown_table import markdown
from real_tables import MODELS

RESULTS = Path(__file__).resolve().parents[1] / "results"
PREDICTIONS = {
    "felt": "`felt`, from the weights", "felt_largest": "its largest site", "cosine": "cosine of the matrices",
    "inputs": "overlap of what is read", "outputs": "overlap of what is written", "norm": "norm of the other patch",
    "disturbance": "`disturbance`, weights and activations", "direction": "`direction`, the same",
    "moved": "`moved`, a forward with the other alone", "additive": "`additive`, forwards of each alone",
}  # fmt: skip
SITES = {"attention": "attention", "down": "down"}
WORDS = 5
Row = dict[str, str]


def read(name: str) -> list[Row]:
    path = RESULTS / name
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    settings = {(row["model"], row["kind"], row["examples"], row["held_out"], row["tokens"]) for row in rows}
    assert len(settings) == len({row["model"] for row in rows}), f"{name}: several settings of a model"
    return rows


def models(rows: list[Row]) -> list[str]:
    """Their names in the files, in the order of MODELS."""
    return [name for name in MODELS if any(row["model"] == name for row in rows)]


def foretell() -> str:
    """Rank correlation of each prediction with the effect lost, its interval, and the mean within an instruction."""
    rows = read("foretell_correlations.csv")
    found = {(row["model"], row["predictor"]): row for row in rows}
    lines = []
    for predictor, name in PREDICTIONS.items():
        line = [name]
        for model in models(rows):
            row = found[model, predictor]
            line += [f"{float(row['spearman']):.2f} ({row['low']} to {row['high']})", f"{float(row['within']):.2f}"]
        lines.append(line)
    head = ["prediction"]
    for model in models(rows):
        head += [f"{MODELS[model]}: ρ with the loss", "within one"]
    return markdown(head, lines)


def losses() -> str:
    """What the second patch takes from the first, for each first one."""
    rows = read("foretell.csv")
    lines = []
    for model in models(rows):
        mine = [row for row in rows if row["model"] == model]
        for name in dict.fromkeys(row["instruction"] for row in mine):
            pairs = sorted(
                ((float(row["loss"]), row["other"]) for row in mine if row["instruction"] == name), reverse=True
            )
            alone = next(float(row["recovered"]) for row in mine if row["instruction"] == name)
            lines.append((
                MODELS[model], name, f"{alone:.2f}", f"{median(loss for loss, _ in pairs):.2f}",
                f"{pairs[0][0]:.2f} ({pairs[0][1]})", f"{pairs[-1][0]:.2f} ({pairs[-1][1]})",
            ))  # fmt: skip
    return markdown(("model", "patch", "recovers alone", "loses, median", "most, by", "least, by"), lines)


def touched() -> str:
    """Medians over patches and blocks of what they touch at a site."""
    rows = read("touched.csv")
    figures = ("strength", "read_gain", "write_gain", "dimensionality", "largest_dimensionality", "transport",
               "largest_transport")  # fmt: skip
    lines = []
    for model in models(rows):
        for site in SITES:
            mine = [row for row in rows if (row["model"], row["site"]) == (model, site)]
            if mine:
                values = [median(float(row[figure]) for row in mine) for figure in figures]
                lines.append((MODELS[model], site, *(f"{value:.2g}" for value in values)))
    head = ("model", "site", "strength", "read gain", "write gain", "mean change of D", "largest", "mean transport",
            "largest")  # fmt: skip
    return markdown(head, lines)


def written() -> str:
    """The tokens that each patch writes towards most, and the features that it moves most."""
    rows = read("touched.csv")
    lines = []
    for model in models(rows):
        mine = [row for row in rows if row["model"] == model]
        for name in dict.fromkeys(row["instruction"] for row in mine):
            own = [row for row in mine if row["instruction"] == name]
            last = str(max(int(row["block"]) for row in own))  # nothing after it turns what is written
            told = max((row for row in own if row["block"] == last), key=lambda row: gains(row)[0][1])
            moved = max(own, key=lambda row: float(row["largest_transport"]))
            words = ", ".join(f"{code(token)} {gain:.0f}" for token, gain in gains(told)[:WORDS])
            numbers = ", ".join(moved["most_transported"].split()[:WORDS])
            lines.append((
                MODELS[model], name, f"block {told['block']}, {told['site']}: {words}",
                f"block {moved['block']}, {moved['site']}: {numbers} (up to {float(moved['largest_transport']):.2f})",
            ))  # fmt: skip
    return markdown(
        ("model", "patch", "tokens that the last block is made to write: gain", "features moved most: transport"), lines
    )


def gains(row: Row) -> list[tuple[str, float]]:
    """Tokens, which may hold spaces and line ends, with their gains."""
    pairs = re.findall(r"(.+?):(\d+\.\d)(?: |$)", row["written"], re.DOTALL)
    return [(token.replace("\n", "⏎").replace("▁", "␣"), float(gain)) for token, gain in pairs]


FORETELL: dict[str, Callable[[], str]] = {
    "foretell": foretell, "foretell losses": losses, "touched": touched, "written": written,
}  # fmt: skip
