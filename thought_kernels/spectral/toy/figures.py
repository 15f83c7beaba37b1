"""Pictures of a saved sweep, each beside what models without training and shuffled ones give."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from thought_kernels.ops.library import message
from thought_kernels.spectral.toy.evolution_rows import evolution_rows
from thought_kernels.spectral.toy.sweeps import CLUSTERS, MODELS, NULL_CLUSTERS, NULLS, read_plan, read_rows
from thought_kernels.spectral.toy.training_figures import dimensionality_figure, evolution_figure

Rows = list[dict[str, float]]
NULL_KINDS = ((0, "0.35", "untrained"), (1, "tab:red", "shuffled"))


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
    for m in dimensions or ():
        if m not in plan.dimensions:
            raise ValueError(message("draw", "dimensions", f"be one of {plan.dimensions}", m))
    target.mkdir(parents=True, exist_ok=True)
    models, nulls = read_rows(source / MODELS), read_rows(source / NULLS)
    # Sweeps of before there was such a file have a mean for each null.
    beside = read_rows(source / NULL_CLUSTERS) if (source / NULL_CLUSTERS).exists() else nulls
    pictures = {
        "saturation": saturation_figure(models, nulls),
        "linearity": linearity_figure(read_rows(source / CLUSTERS), beside),
        "residue": residue_figure(models, nulls),
        **(_of_training(source, dimensions, sparsity) if plan.checkpoints else {}),
    }
    return [save(figure, target / f"{name}.png") for name, figure in pictures.items()]


def _of_training(source: Path, dimensions: Sequence[int] | None, sparsity: float) -> dict[str, Any]:
    rows = evolution_rows(source, dimensions or (), (sparsity,))
    chosen = sorted({row["dimensions"] for row in rows})
    pictures = {}
    for m in chosen:
        mine = [row for row in rows if row["dimensions"] == m]
        name = f"-m{m}" if len(chosen) > 1 else ""
        pictures[f"dimensionality{name}"] = dimensionality_figure(mine, m)
        pictures[f"evolution{name}"] = evolution_figure(mine)
    return pictures


def by_sparsity(rows: Rows, nulls: Rows) -> str:
    """A Markdown table of models.csv: means over m and seeds at each sparsity, and the lowest saturation.

    In brackets the same of the untrained models, and of the trained ones with their entries shuffled.
    """
    figures: dict[str, Callable[[dict[str, float]], float]] = {
        "Σ D / m": lambda row: row["dimensionality"] / row["dimensions"],
        "represented / n": lambda row: row["represented"] / row["features"],
        "eigenspaces": lambda row: row["eigenspaces"],
        "localization": lambda row: row["localization"],
        "spread": lambda row: row["spread"],
        "residual CV": lambda row: row["residual"],
        "R²": lambda row: row["r_squared"],
        "kλ − 1, absolute": lambda row: row["slope_error"],
    }
    names = list(figures)
    lines = ["| " + " | ".join(["S", names[0], "lowest", *names[1:]]) + " |"]
    lines.append("| " + " | ".join(["---"] * (len(names) + 2)) + " |")
    for sparsity in sorted({row["sparsity"] for row in rows}):
        groups = [[row for row in rows if row["sparsity"] == sparsity]]
        groups += [[row for row in nulls if (row["sparsity"], row["shuffled"]) == (sparsity, kind)] for kind in (0, 1)]
        cells = {name: _beside([_mean([of(row) for row in group]) for group in groups]) for name, of in figures.items()}
        lowest = min(row["dimensionality"] / row["dimensions"] for row in groups[0])
        first, *others = cells.values()
        lines.append("| " + " | ".join([f"{sparsity:g}", first, f"{lowest:.4f}", *others]) + " |")
    return "\n".join(lines)


def _beside(values: list[float]) -> str:
    return f"{values[0]:.4f} ({values[1]:.3f}, {values[2]:.3f})"


def saturation_figure(rows: Rows, nulls: Rows) -> Any:
    """Fig. 5: Σ_i D_i / m against sparsity, one line for each m (mean over seeds), beside the paper's value, 1.

    Dotted, in each m's colour: untrained models. Shuffled ones are where these are.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    lines, counts = figure.subplots(1, 2, width_ratios=(2, 1))
    sizes = sorted({row["dimensions"] for row in rows})
    for index, m in enumerate(sizes):
        mine, colour = [row for row in rows if row["dimensions"] == m], colormaps["viridis"](index / len(sizes))
        sparsities = sorted({row["sparsity"] for row in mine})
        means = [_mean([row["dimensionality"] / m for row in mine if row["sparsity"] == S]) for S in sparsities]
        lines.plot(sparsities, means, "o-", ms=3, lw=1, color=colour, label=f"m = {m:.0f}")
        without = [row["dimensionality"] / m for row in nulls if row["dimensions"] == m and not row["shuffled"]]
        lines.axhline(_mean(without), ls=":", lw=1, color=colour)
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
    return figure


def linearity_figure(rows: Rows, nulls: Rows) -> Any:
    """Fig. 6: R² of D = ‖w‖²/λ against localization, one point for each cluster, |kλ − 1| as its error bar.

    Crosses are the clusters of untrained and of shuffled models.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axis = figure.subplots()
    x, y, error, sparsities = (
        [row[name] for row in rows] for name in ("localization", "r_squared", "slope_error", "sparsity")
    )
    axis.errorbar(x, y, yerr=error, fmt="none", ecolor="0.8", elinewidth=0.6, zorder=1)
    points = axis.scatter(x, y, c=sparsities, s=7, cmap="viridis", zorder=3)
    for kind, colour, label in NULL_KINDS:
        mine = [row for row in nulls if row["shuffled"] == kind]
        places = ([row[name] for row in mine] for name in ("localization", "r_squared"))
        axis.plot(*places, "x", ms=2, mew=0.4, alpha=0.4, color=colour, label=label, zorder=2)
    axis.legend(fontsize=7, loc="lower right")
    figure.colorbar(points, label="sparsity S")
    axis.set(xlabel="localization: mean of max p over the cluster", ylabel="R² of D = ‖w‖²/λ")
    axis.set_ylim(bottom=max(-1.0, axis.get_ylim()[0]))
    return figure


def residue_figure(rows: Rows, nulls: Rows) -> Any:
    """Theorem 9: the share of the rank held by features of slack ≥ τ against its bound ε/τ, one point a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    line = torch.logspace(-5, 0, 100)
    for axis, name, tau in ((axes[0], "held_001", 0.01), (axes[1], "held_01", 0.1)):
        for kind, colour, label in NULL_KINDS:
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
    return figure


def save(figure: Any, path: Path, description: str | None = None) -> Path:
    """Writes a figure as a PNG, replacing the file in one step.

    No version stands in the file: equal pictures of one matplotlib are equal bytes.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        figure.savefig(temporary, format="png", dpi=90, metadata={"Software": None, "Description": description})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
