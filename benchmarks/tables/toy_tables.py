"""The tables of docs/toy_models.md, from the results of the toy sweeps."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import isnan
from pathlib import Path
from statistics import fmean, median
from typing import Any

from markdown_table import markdown

from thought_kernels.spectral.toy.evolution_rows import read_evolution
from thought_kernels.spectral.toy.figures import Rows, by_sparsity
from thought_kernels.spectral.toy.geometries import SETTINGS
from thought_kernels.spectral.toy.summary import TIGHT
from thought_kernels.spectral.toy.sweeps import read_rows
from thought_kernels.spectral.toy.training_figures import PLATEAUS

RESULTS = Path(__file__).resolve().parents[1] / "results"
NEAR = 0.01  # of a D to that of an exact figure


def table(name: str, nonuniform: bool = False) -> Rows:
    return read_rows(RESULTS / f"toy_{name}{'_nonuniform' * nonuniform}.csv")


def kinds(nulls: Rows) -> list[Rows]:
    """Untrained models, and shuffled ones."""
    return [[row for row in nulls if row["shuffled"] == kind] for kind in (0, 1)]


def each(groups: Sequence[Rows], of: Callable[[dict[str, float]], float], digits: str = ".3f") -> str:
    """Means: trained (untrained, shuffled)."""
    first, *others = (format(fmean(of(row) for row in group), digits) for group in groups)
    return f"{first} ({', '.join(others)})"


def at(rows: Rows, sparsity: float) -> Rows:
    return [row for row in rows if row["sparsity"] == sparsity]


def sweep() -> str:
    return by_sparsity(table("sweep"), table("nulls"))


def by_dimensions(name: str) -> str:
    """A column of a model's row by m: dense inputs, the middle, and the sparsest, each beside its nulls."""
    groups = [table("sweep"), *kinds(table("nulls"))]
    shown = (0.0, 0.27, 0.45, 0.63, 0.72, 0.9, 0.99)
    lines = []
    for m in sorted({row["dimensions"] for row in groups[0]}):
        cells = []
        for sparsity in shown:
            mine = [[row for row in at(group, sparsity) if row["dimensions"] == m] for group in groups]
            cells.append(each(mine, lambda row: row[name], ".2f"))
        lines.append((f"{m:.0f}", *cells))
    return markdown(("m", *(f"S = {sparsity:g}" for sparsity in shown)), lines)


def localization() -> str:
    return by_dimensions("localization")


def band() -> str:
    return by_dimensions("band")


def residue() -> str:
    """Theorem 9: leverage held above a slack, its bound, and how near to it a model comes."""
    groups = [table("sweep"), *kinds(table("nulls"))]
    lines = []
    for sparsity in sorted({row["sparsity"] for row in groups[0]}):
        mine = [at(group, sparsity) for group in groups]
        cells = [f"{sparsity:g}", each(mine, lambda row: 1 - row["saturation"], ".4f")]
        for name, tau in (("held_001", 0.01), ("held_01", 0.1)):
            bounds = [(1 - row["saturation"]) / tau for row in mine[0]]
            used = max(row[name] / bound for row, bound in zip(mine[0], bounds, strict=True) if bound)
            cells += [each(mine, lambda row, name=name: row[name], ".3f"), f"{fmean(bounds):.3f}", f"{used:.2f}"]
        lines.append(tuple(cells))
    head = ("S", "ε", "held at slack ≥ 0.01", "ε/0.01", "most of it", "held at slack ≥ 0.1", "ε/0.1", "most of it")
    return markdown(head, lines)


def frames() -> str:
    """How near clusters are to tight frames, and those of the nulls."""
    lines = []
    for name, spread in (("uniform", False), ("non-uniform", True)):
        clusters = [table("clusters", spread), *kinds(table("null_clusters", spread))]
        models = [table("sweep", spread), *kinds(table("nulls", spread))]
        for kind, mine, having in zip(("trained", "untrained", "shuffled"), clusters, models, strict=True):
            residuals = sorted(row["residual"] for row in mine)
            shares = [residuals[round(share * (len(residuals) - 1))] for share in (0, 0.01, 0.1, 0.25, 0.5, 0.9)]
            near = sum(value <= TIGHT for value in residuals)
            tight = sum(row["tight"] > 0 for row in having)
            lines.append((f"{name}, {kind}", *(f"{value:.2f}" for value in shares), f"{near} of {len(mine)}",
                          f"{tight} of {len(having)}"))  # fmt: skip
    head = ("sweep", "lowest", "1 %", "10 %", "25 %", "median", "90 %", f"clusters ≤ {TIGHT}", "models with one")
    return markdown(head, lines)


def nonuniform() -> str:
    """The non-uniform sweep beside the uniform models of its m."""
    spread = table("sweep", True)
    dimensions = {row["dimensions"] for row in spread}
    uniform = [row for row in table("sweep") if row["dimensions"] in dimensions]
    groups = [spread, *kinds(table("nulls", True))]
    lines = []
    for sparsity in sorted({row["sparsity"] for row in spread}):
        plain, mine = at(uniform, sparsity), [at(group, sparsity) for group in groups]
        figures: dict[str, Callable[[dict[str, float]], float]] = {
            "saturation": lambda row: row["dimensionality"] / row["dimensions"],
            "represented": lambda row: row["represented"] / row["features"],
            "localization": lambda row: row["localization"],
            "band": lambda row: row["band"],
            "varied": lambda row: row["most_varied"] / row["represented"],
        }
        cells = [f"{sparsity:g}"]
        for name, of in figures.items():
            plain_cell = [] if name == "varied" else [f"{fmean(map(of, plain)):.3f}"]
            cells += [*plain_cell, each(mine, of)]
        lines.append((*cells, f"{min(map(figures['varied'], mine[0])):.2f}"))
    head = ("S, mean", "Σ D / m, uniform", "non-uniform", "represented / n, uniform", "non-uniform",
            "localization, uniform", "non-uniform", "band, uniform", "non-uniform",
            "most varied", "lowest")  # fmt: skip
    return markdown(head, lines)


def drift() -> str:
    """Gradient flow's prediction, by step."""
    rows = table("drift")
    steps = sorted({row["step"] for row in rows})
    names = {
        "error of Ṁ, plain descent": "descent_error", "a tenth as far": "nearer_error", "of λ̇": "descent_eigenvalues",
        "a tenth as far, λ̇": "nearer_eigenvalues", "‖λ̇‖/‖Ṁ‖": "eigenvalue_share", "cosine of Ṁ to training": "gram",
        "of λ̇ to training": "eigenvalues", "transport": "transport", "fixed point": "fixed_point",
    }  # fmt: skip
    lines = []
    for step in sorted({*steps[::3], steps[-1]}):
        mine = [row for row in rows if row["step"] == step]
        known = [[row[name] for row in mine if not isnan(row[name])] for name in names.values()]
        lines.append((f"{step:.0f}", *(f"{fmean(values):.3f}" for values in known)))
    return markdown(("step", *names), lines)


def evolution() -> str:
    """Jumps and volatility of each model whose training is told, beside those of untrained models in a row."""
    lines = []
    for path in sorted(RESULTS.glob("toy_evolution*.csv")):
        rows = read_evolution(path)
        models = {(row["features"], row["dimensions"], row["sparsity"]) for row in rows if row["quantity"] == "jump"}
        for n, m, sparsity in sorted(models):
            mine = [row for row in rows if (row["dimensions"], row["sparsity"]) == (m, sparsity)]

            def last(quantity: str, level: float, mine: Sequence[dict[str, Any]] = mine) -> list[float]:
                return [row["value"] for row in mine if (row["quantity"], row["level"]) == (quantity, level)]

            full, jumps, chance = last("saturation", 1), last("jump", 0.5), last("untrained jump", 0.5)
            lines.append((
                f"{n:.0f}", f"{m:.0f}", f"{sparsity:g}", f"{full[0]:.3f}", f"{full[-1]:.4f}",
                *(f"{100 * value:.2g} %" for value in (*chance, jumps[0], max(jumps), jumps[len(jumps) // 2])),
                f"{100 * jumps[-1]:.2g} % ({100 * last('jump', 1)[-1]:.2g} %)",
                f"{last('volatility', 0.5)[-1]:.2g} ({last('untrained volatility', 0.5)[0]:.2g})",
            ))  # fmt: skip
    head = ("n", "m", "S", "Σ D / rank untrained", "trained", "median jump, untrained", "first", "largest median",
            "halfway", "last (of any feature)", "last median volatility (untrained)")  # fmt: skip
    return markdown(head, lines)


def plateaus() -> str:
    """Which part of the features of m = 16 has the D of an exact figure."""
    rows = [row for row in read_evolution(RESULTS / "toy_evolution.csv") if row["quantity"] == "dimensionality"]
    n, m = rows[0]["features"], rows[0]["dimensions"]
    values = {"0, given up": 0.0, f"m/n = {m / n:g}": m / n} | PLATEAUS | {"alone 1": 1.0}
    lines = []
    for sparsity in sorted({row["sparsity"] for row in rows}):
        mine = [row for row in rows if row["sparsity"] == sparsity]
        groups = [[row["value"] for row in mine if bool(row["step"]) == trained] for trained in (True, False)]
        shares = [[fmean(abs(D - value) <= NEAR for D in group) for group in groups] for value in values.values()]
        lines.append((f"{sparsity:g}", *(f"{share:.2f} ({chance:.2f})" for share, chance in shares)))
    return markdown(("S", *values), lines)


def figures() -> str:
    """Sentences of figures that the page quotes."""
    rows, clusters, (untrained, _) = table("sweep"), table("clusters"), kinds(table("nulls"))
    spread, (untrained_spread, _) = table("sweep", True), kinds(table("nulls", True))
    unsparse = [row for row in spread if row["sparsity"] <= 0.9]
    wide = [row["represented"] / row["dimensions"] for row in spread if row["sparsity"] < 0.85]
    untrained_wide = [row["represented"] / row["dimensions"] for row in untrained_spread]
    formula = [row["saturation"] * (1 + row["dimensions"] / row["features"]) for row in untrained]
    (null_clusters, _), (null_wide, _) = kinds(table("null_clusters")), kinds(table("null_clusters", True))
    beside = (rows, untrained)
    lines = [
        ("uniform models with Σ D / m ≥ 0.994", *(f"{sum(map(above, full(g)))} of {len(g)}" for g in beside)),
        ("lowest Σ D / m, uniform, m ≥ 16", *(f"{min(full(large(g))):.3f}" for g in beside)),
        ("highest Σ D / m, uniform, m ≥ 16", *(f"{max(full(large(g))):.3f}" for g in beside)),
        ("uniform models with less than half of their features band-localized",
         *(f"{sum(row['band'] < 0.5 for row in g)} of {len(g)}" for g in beside)),
        ("Σ D / m at S = 0.99, m = 8, 16, 32, 64", *(", ".join(f"{fmean(full(of(at(g, 0.99), m))):.4f}"
                                                      for m in (8, 16, 32, 64)) for g in beside)),
        ("saturation times (1 + m/n), lowest and highest", "", f"{min(formula):.3f}, {max(formula):.3f}"),
        ("lowest R² of a cluster, uniform", *(least(g, "r_squared") for g in (clusters, null_clusters))),
        ("lowest localization of a cluster, uniform", *(least(g, "localization") for g in (clusters, null_clusters))),
        ("median spread of a cluster, uniform", f"{median(row['spread'] for row in clusters):.4f}", ""),
        ("lowest Σ D / m up to S = 0.9, non-uniform", f"{min(full(unsparse)):.3f}", ""),
        ("lowest Σ D / m, non-uniform", *(f"{min(full(g)):.3f}" for g in (spread, untrained_spread))),
        ("represented features a dimension up to S = 0.81, non-uniform, lowest and highest",
         *(f"{min(g):.4g}, {max(g):.4g}" for g in (wide, untrained_wide))),
        ("lowest R² of a cluster, non-uniform", *(least(g, "r_squared") for g in (table("clusters", True), null_wide))),
    ]  # fmt: skip
    return markdown(("figure", "trained", "untrained"), lines)


def full(rows: Rows) -> list[float]:
    return [row["dimensionality"] / row["dimensions"] for row in rows]


def above(value: float) -> bool:
    return value >= 0.994


def of(rows: Rows, m: int) -> Rows:
    return [row for row in rows if row["dimensions"] == m]


def large(rows: Rows) -> Rows:
    return [row for row in rows if row["dimensions"] >= 16]


def least(rows: Rows, name: str) -> str:
    return f"{min(row[name] for row in rows):.3f}"


def geometries() -> str:
    """Which figures small models settle in, and how many show one untrained."""
    with (RESULTS / "toy_geometries.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = []
    for setting in SETTINGS:
        n, m = str(setting.features), str(setting.dimensions)
        mine = [row for row in rows if (row["features"], row["dimensions"]) == (n, m)]
        (chosen,) = [row for row in mine if row["figure"] == setting.figure]
        others = [f"{row['figure']} ({row['models']})" for row in mine if row is not chosen and row["models"] != "0"]
        without = [f"{row['figure']} {row['untrained']}" for row in mine if row["untrained"] != "0"]
        D, spread = float(chosen["dimensionality"]), float(chosen["eigenvalue_spread"])
        lines.append((
            setting.figure, f"{n}, {m}", f"{setting.sparsity:g}", f"{chosen['models']} of {chosen['seeds']}",
            f"{chosen['untrained']} of {chosen['seeds']} ({', '.join(without)})",
            str(Fraction(setting.dimensions, setting.features)), f"{D:.4f}", f"{spread:.4f}", ", ".join(others),
        ))  # fmt: skip
    head = (
        "figure",
        "n, m",
        "S",
        "found",
        "untrained (all)",
        "D, expected",
        "D, found",
        "(λ_max − λ_min)/λ_max",
        "else",
    )
    return markdown(head, lines)


TOY: dict[str, Callable[[], str]] = {
    "toy sweep": sweep,
    "toy localization": localization,
    "toy band": band,
    "toy residue": residue,
    "toy frames": frames,
    "toy drift": drift,
    "toy nonuniform": nonuniform,
    "toy evolution": evolution,
    "toy plateaus": plateaus,
    "toy geometries": geometries,
    "toy figures": figures,
}
