"""The tables of docs/toy_models.md, from the results of the toy sweeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isnan
from pathlib import Path
from statistics import fmean, median

from markdown_table import markdown

from thought_kernels.spectral.toy.figures import Rows, by_sparsity
from thought_kernels.spectral.toy.summary import TIGHT
from thought_kernels.spectral.toy.sweeps import read_rows

RESULTS = Path(__file__).resolve().parents[1] / "results"


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


def localization() -> str:
    """By m: dense inputs, the middle, and the sparsest, each beside its nulls."""
    groups = [table("sweep"), *kinds(table("nulls"))]
    shown = (0.0, 0.45, 0.72, 0.9, 0.99)
    lines = []
    for m in sorted({row["dimensions"] for row in groups[0]}):
        cells = []
        for sparsity in shown:
            mine = [[row for row in at(group, sparsity) if row["dimensions"] == m] for group in groups]
            cells.append(each(mine, lambda row: row["localization"], ".2f"))
        lines.append((f"{m:.0f}", *cells))
    return markdown(("m", *(f"S = {sparsity:g}" for sparsity in shown)), lines)


def residue() -> str:
    """Theorem 9: leverage held above a slack, and its bound."""
    groups = [table("sweep"), *kinds(table("nulls"))]
    lines = []
    for sparsity in sorted({row["sparsity"] for row in groups[0]}):
        mine = [at(group, sparsity) for group in groups]
        cells = [f"{sparsity:g}", each(mine, lambda row: 1 - row["saturation"], ".4f")]
        for name, tau in (("held_001", 0.01), ("held_01", 0.1)):
            bound = fmean(min(1.0, (1 - row["saturation"]) / tau) for row in mine[0])
            cells += [each(mine, lambda row, name=name: row[name], ".3f"), f"{bound:.3f}"]
        lines.append(tuple(cells))
    head = ("S", "ε", "held at slack ≥ 0.01", "at most ε/0.01", "held at slack ≥ 0.1", "at most ε/0.1")
    return markdown(head, lines)


def frames() -> str:
    """How near clusters are to tight frames."""
    lines = []
    for name, nonuniform in (("uniform", False), ("non-uniform", True)):
        clusters, models = table("clusters", nonuniform), table("sweep", nonuniform)
        groups = [models, *kinds(table("nulls", nonuniform))]
        residuals = sorted(row["residual"] for row in clusters)
        quantiles = [residuals[round(share * (len(residuals) - 1))] for share in (0.1, 0.25, 0.5, 0.75, 0.9)]
        having = [sum(row["tight"] > 0 for row in group) for group in groups]
        lines.append((name, str(len(clusters)), *(f"{value:.2f}" for value in quantiles),
                      *(f"{count} of {len(group)}" for count, group in zip(having, groups, strict=True))))  # fmt: skip
    head = ("sweep", "clusters", "10 %", "25 %", "median", "75 %", "90 %",
            f"trained models with one ≤ {TIGHT}", "untrained", "shuffled")  # fmt: skip
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
        }
        cells = [f"{sparsity:g}"]
        for name, of in figures.items():
            cells.append(f"{fmean(map(of, plain)):.4f}")
            cells.append(f"{fmean(map(of, mine[0])):.4f}" if name == "represented" else each(mine, of, ".4f"))
        pooled = sum(row["most_varied"] for row in mine[0]) / sum(row["represented"] for row in mine[0])
        each_model = [row["most_varied"] / row["represented"] for row in mine[0]]
        cells += [f"{100 * pooled:.0f} %", f"{100 * fmean(each_model):.0f} % ({100 * min(each_model):.0f} %)"]
        lines.append(tuple(cells))
    head = ("S, mean", "Σ D / m, uniform", "non-uniform", "represented / n, uniform", "non-uniform",
            "localization, uniform", "non-uniform", "most varied, pooled", "mean over models (lowest)")  # fmt: skip
    return markdown(head, lines)


def drift() -> str:
    """Gradient flow's prediction, by step."""
    rows = table("drift")
    steps = sorted({row["step"] for row in rows})
    names = ("descent_error", "descent_eigenvalues", "gram", "eigenvalues", "transport", "fixed_point")
    lines = []
    for step in steps[::3]:
        known = [[row[name] for row in rows if row["step"] == step and not isnan(row[name])] for name in names]
        lines.append((f"{step:.0f}", *(f"{fmean(values):.3f}" for values in known)))
    head = ("step", "error of Ṁ, plain descent", "of λ̇", "cosine of Ṁ to training", "of λ̇", "transport", "fixed point")
    return markdown(head, lines)


def figures() -> str:
    """Sentences of figures that the page quotes."""
    rows, clusters = table("sweep"), table("clusters")
    full = [row["dimensionality"] / row["dimensions"] for row in rows]
    spread = table("sweep", True)
    wide = [row["dimensionality"] / row["dimensions"] for row in spread]
    untrained = kinds(table("nulls"))[0]
    formula = [row["saturation"] * (1 + row["dimensions"] / row["features"]) for row in untrained]
    unsparse = [value for value, row in zip(wide, spread, strict=True) if row["sparsity"] <= 0.9]
    lines = [
        ("uniform models with Σ D / m ≥ 0.994", f"{sum(value >= 0.994 for value in full)} of {len(full)}"),
        ("lowest Σ D / m, uniform", f"{min(full):.3f}"),
        ("untrained saturation times (1 + m/n), lowest and highest", f"{min(formula):.3f}, {max(formula):.3f}"),
        ("lowest R² of a cluster, uniform", f"{min(row['r_squared'] for row in clusters):.3f}"),
        ("lowest localization of a cluster, uniform", f"{min(row['localization'] for row in clusters):.3f}"),
        ("median spread of a cluster, uniform", f"{median(row['spread'] for row in clusters):.4f}"),
        ("lowest Σ D / m up to S = 0.9, non-uniform", f"{min(unsparse):.3f}"),
        ("lowest Σ D / m, non-uniform", f"{min(wide):.3f}"),
        ("lowest R² of a cluster, non-uniform", f"{min(row['r_squared'] for row in table('clusters', True)):.3f}"),
    ]
    return markdown(("figure", "value"), lines)


TOY: dict[str, Callable[[], str]] = {
    "toy sweep": sweep,
    "toy localization": localization,
    "toy residue": residue,
    "toy frames": frames,
    "toy drift": drift,
    "toy nonuniform": nonuniform,
    "toy figures": figures,
}
