"""Pictures of a saved sweep, each beside what models without training and shuffled ones give."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from thought_kernels.ops.library import message
from thought_kernels.spectral.frames import fractional_dimensionality
from thought_kernels.spectral.toy.evolution import Evolution, spectral_evolution
from thought_kernels.spectral.toy.plans import build
from thought_kernels.spectral.toy.sweeps import (
    CLUSTERS,
    MODELS,
    NULLS,
    final_weights,
    read_plan,
    read_rows,
    trained,
)
from thought_kernels.spectral.toy.training import history

Rows = list[dict[str, float]]
PLATEAUS = {"tetrahedron 3/4": 3 / 4, "triangle 2/3": 2 / 3, "digon 1/2": 1 / 2, "pentagon 2/5": 2 / 5,
            "antiprism 3/8": 3 / 8}  # fmt: skip
_LOOK = {"dpi": 90, "metadata": {"Software": None}}  # no version in the file: equal pictures are equal bytes


def draw(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dimensions: Sequence[int] | None = None,
    sparsity: float = 0.9,
) -> list[Path]:
    """All pictures that a finished sweep allows.

    Args:
        folder: the sweep's.
        output: folder for PNG files; created if it does not exist.
        dimensions: m of the models whose dimensionalities and training are drawn, in pictures named after m where there
            are several; a middle one if not given.
        sparsity: of the model whose training is drawn; the nearest one is taken.

    Returns:
        The files written. Without checkpoints, the pictures of training are left out.

    Raises:
        ValueError: a folder without a finished sweep, or without models of that m.
    """
    source, target = Path(folder), Path(output)
    if not (source / MODELS).exists():
        raise ValueError(message("draw", "folder", "hold a finished sweep", f"no {MODELS}", str(source)))
    plan, _ = read_plan(source)
    chosen = dimensions or [plan.dimensions[len(plan.dimensions) // 2 - 1]]
    for m in chosen:
        if m not in plan.dimensions:
            raise ValueError(message("draw", "dimensions", f"be one of {plan.dimensions}", m))
    target.mkdir(parents=True, exist_ok=True)
    models, nulls = read_rows(source / MODELS), read_rows(source / NULLS)
    written = [
        saturation_figure(models, nulls, target / "saturation.png"),
        linearity_figure(read_rows(source / CLUSTERS), nulls, target / "linearity.png"),
        residue_figure(models, nulls, target / "residue.png"),
    ]
    for m in chosen if plan.checkpoints else ():
        name = f"-m{m}" if len(chosen) > 1 else ""
        written.append(dimensionality_figure(source, m, target / f"dimensionality{name}.png"))
        _, _, group, index = min(trained(source, m), key=lambda run: (abs(run[0] - sparsity), run[1]))
        kept = history(group)
        evolution = spectral_evolution([step for step, _, _ in kept], [weight[index] for _, weight, _ in kept])
        written.append(evolution_figure(evolution, target / f"evolution{name}.png"))
    return written


def by_sparsity(rows: Rows, nulls: Rows) -> str:
    """A Markdown table of models.csv: means over m and seeds at each sparsity, and the lowest saturation.

    In brackets the same of the untrained models, and of the trained ones with their entries shuffled.
    """
    figures: dict[str, Callable[[dict[str, float]], float]] = {
        "Σ D / m": lambda row: row["dimensionality"] / row["dimensions"],
        "localization": lambda row: row["localization"],
        "spread": lambda row: row["spread"],
        "residual CV": lambda row: row["residual"],
        "R²": lambda row: row["r_squared"],
        "kλ − 1, absolute": lambda row: row["slope_error"],
    }
    names = list(figures)
    lines = ["| " + " | ".join(["S", names[0], "lowest", "represented / n", *names[1:]]) + " |"]
    lines.append("| " + " | ".join(["---"] * (len(names) + 3)) + " |")
    for sparsity in sorted({row["sparsity"] for row in rows}):
        groups = [[row for row in rows if row["sparsity"] == sparsity]]
        groups += [[row for row in nulls if (row["sparsity"], row["shuffled"]) == (sparsity, kind)] for kind in (0, 1)]
        cells = {name: _beside([_mean([of(row) for row in group]) for group in groups]) for name, of in figures.items()}
        lowest = min(row["dimensionality"] / row["dimensions"] for row in groups[0])
        share = _mean([row["represented"] for row in groups[0]]) / groups[0][0]["features"]
        first, *others = cells.values()
        lines.append("| " + " | ".join([f"{sparsity:g}", first, f"{lowest:.4f}", f"{share:.3f}", *others]) + " |")
    return "\n".join(lines)


def _beside(values: list[float]) -> str:
    return f"{values[0]:.4f} ({values[1]:.3f}, {values[2]:.3f})"


def saturation_figure(rows: Rows, nulls: Rows, path: Path) -> Path:
    """Fig. 5: Σ_i D_i / m against sparsity, one line for each m (mean over seeds), beside the paper's value, 1.

    Dashed, in each m's colour: untrained models. Shuffled ones are where these are.
    """
    plt = _pyplot()
    figure, (lines, counts) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(2, 1))
    sizes = sorted({row["dimensions"] for row in rows})
    for index, m in enumerate(sizes):
        mine = [row for row in rows if row["dimensions"] == m]
        sparsities = sorted({row["sparsity"] for row in mine})
        means = [_mean([row["dimensionality"] / m for row in mine if row["sparsity"] == S]) for S in sparsities]
        lines.plot(sparsities, means, "o-", ms=3, lw=1, color=plt.cm.viridis(index / len(sizes)), label=f"m = {m:.0f}")
        without = [row["dimensionality"] / m for row in nulls if row["dimensions"] == m and not row["shuffled"]]
        lines.axhline(_mean(without), ls=":", lw=1, color=plt.cm.viridis(index / len(sizes)))
    lines.plot([], [], ls=":", lw=1, color="0.4", label="untrained")
    for axis, place in ((lines, lines.axhline), (counts, counts.axvline)):
        place(1, color="crimson", ls="--", lw=1, label="paper: Σ D = m" if axis is lines else None)
    lines.set(xlabel="sparsity S", ylabel="Σ D / m")
    lines.legend(fontsize=7, ncol=3)
    shares = {
        name: [row["dimensionality"] / row["dimensions"] for row in group]
        for name, group in (("trained", rows), ("untrained", [row for row in nulls if not row["shuffled"]]))
    }
    edges = torch.linspace(min(map(min, shares.values())), 1, 41).tolist()
    for name, values in shares.items():
        counts.hist(values, bins=edges, alpha=0.7, label=name)
    counts.legend(fontsize=7)
    counts.set(xlabel="Σ D / m", ylabel=f"models, of {len(rows)}")
    return _save(figure, path)


def linearity_figure(rows: Rows, nulls: Rows, path: Path) -> Path:
    """Fig. 6: R² of D = ‖w‖²/λ against localization, one point for each cluster, |kλ − 1| as its error bar.

    Crosses are untrained and shuffled models, the mean over the clusters of each.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    x, y, error, sparsities = (
        [row[name] for row in rows] for name in ("localization", "r_squared", "slope_error", "sparsity")
    )
    axis.errorbar(x, y, yerr=error, fmt="none", ecolor="0.8", elinewidth=0.6, zorder=1)
    points = axis.scatter(x, y, c=sparsities, s=7, cmap="viridis", zorder=2)
    for kind, colour, label in ((0, "0.35", "untrained"), (1, "tab:red", "shuffled")):
        mine = [row for row in nulls if row["shuffled"] == kind]
        x, y = ([row[name] for row in mine] for name in ("localization", "r_squared"))
        axis.plot(x, y, "x", ms=3, mew=0.6, color=colour, label=label, zorder=1)
    axis.legend(fontsize=7, loc="lower right")
    figure.colorbar(points, label="sparsity S")
    axis.set(xlabel="localization: mean of max p over the cluster", ylabel="R² of D = ‖w‖²/λ")
    axis.set_ylim(bottom=max(-1.0, axis.get_ylim()[0]))
    return _save(figure, path)


def residue_figure(rows: Rows, nulls: Rows, path: Path) -> Path:
    """Theorem 9: the share of the rank held by features of slack ≥ τ against its bound ε/τ, one point a model."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    line = torch.logspace(-5, 0, 100)
    for axis, name, tau in ((axes[0], "held_001", 0.01), (axes[1], "held_01", 0.1)):
        for kind, colour, label in ((0, "0.35", "untrained"), (1, "tab:red", "shuffled")):
            mine = [row for row in nulls if row["shuffled"] == kind]
            axis.plot([(1 - row["saturation"]) / tau for row in mine], [row[name] for row in mine], "x", ms=3, mew=0.6,
                      color=colour, label=label)  # fmt: skip
        bounds = [(1 - row["saturation"]) / tau for row in rows]
        colours = [row["sparsity"] for row in rows]
        points = axis.scatter(bounds, [row[name] for row in rows], c=colours, s=8, cmap="viridis", zorder=2)
        axis.plot(line, line, "--", lw=1, color="crimson", label="Theorem 9: at most ε/τ")
        axis.set(xscale="log", xlabel=f"ε / τ, τ = {tau}")
    axes[0].set(ylabel="leverage at slack ≥ τ, of the rank")
    axes[0].legend(fontsize=7)
    figure.colorbar(points, ax=axes, label="sparsity S")
    return _save(figure, path)


def dimensionality_figure(folder: Path, dimensions: int, path: Path) -> Path:
    """Every feature's D_i against 1/(1 − S), with the values of exact figures as lines (Elhage et al., 2022).

    Grey: the same models before training.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    runs = sorted(trained(folder, dimensions), key=lambda run: run[:2])
    plan, found = read_plan(folder)
    for group in found:
        if group.dimensions == dimensions:
            for (sparsity, _), W in zip(group.runs, build(plan, group).weight, strict=True):
                D = fractional_dimensionality(W, dtype=torch.float64)
                axis.plot(torch.full_like(D, 1.07 / (1 - sparsity)), D, ".", ms=1, color="0.6", alpha=0.4)
    for sparsity, _, kept, index in runs:
        D = fractional_dimensionality(final_weights(kept, index), dtype=torch.float64)
        # Spread a little, by order and not at random: features of one model would hide each other.
        place = torch.linspace(0.96, 1.04, len(D), dtype=torch.float64) / (1 - sparsity)
        axis.plot(place, D, ".", ms=1.5, color="C0", alpha=0.5)
    for name, value in PLATEAUS.items():
        axis.axhline(value, lw=0.6, color="0.6", zorder=0)
        axis.annotate(name, (1.0, value), xycoords=("axes fraction", "data"), fontsize=6, va="center")
    axis.set(xscale="log", xlabel="1 / (1 − S)", ylabel=f"D, every feature of m = {dimensions}")
    return _save(figure, path)


def evolution_figure(evolution: Evolution, path: Path) -> Path:
    """Eigenvalues, Rayleigh quotients, jumps and volatility along one model's training (appendix I)."""
    plt = _pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True)
    steps, between = evolution.steps, evolution.steps[1:]
    axes[0, 0].plot(steps, evolution.eigenvalues, lw=0.7, color="C0")
    axes[0, 0].set(ylabel="eigenvalues of F")
    axes[0, 1].plot(steps, evolution.rayleigh, lw=0.3, color="C1", alpha=0.5)
    axes[0, 1].set(ylabel="Rayleigh quotients κ")
    for axis, values, name in ((axes[1, 0], evolution.jump, "jump"), (axes[1, 1], evolution.volatility, "volatility")):
        for share, style in ((0.5, "-"), (0.9, "--"), (1.0, ":")):
            label = "largest" if share == 1 else f"{share:.0%} of features below"
            axis.plot(between, values.quantile(share, dim=1), style, lw=1, color="C2", label=label)
        axis.set(xlabel="step", ylabel=name, yscale="symlog")
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.legend(fontsize=7)
    return _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> Path:
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    figure.savefig(path, **_LOOK)
    _pyplot().close(figure)
    return path


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
