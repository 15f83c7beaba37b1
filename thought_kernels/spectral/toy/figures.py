"""Pictures of a saved sweep: saturation, projective linearity, fractional dimensionalities, evolution."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from thought_kernels.ops.library import message
from thought_kernels.spectral.frames import fractional_dimensionality
from thought_kernels.spectral.toy.evolution import Evolution, spectral_evolution
from thought_kernels.spectral.toy.sweeps import CLUSTERS, MODELS, final_weights, read_plan, read_rows, trained
from thought_kernels.spectral.toy.training import history

Rows = list[dict[str, float]]
PLATEAUS = {"tetrahedron 3/4": 3 / 4, "triangle 2/3": 2 / 3, "digon 1/2": 1 / 2, "pentagon 2/5": 2 / 5,
            "antiprism 3/8": 3 / 8}  # fmt: skip
_LOOK = {"dpi": 90, "metadata": {"Software": None}}  # no version in the file: equal pictures are equal bytes


def draw(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dimensions: int | None = None,
    sparsity: float = 0.9,
) -> list[Path]:
    """All pictures that a finished sweep allows.

    Args:
        folder: the sweep's.
        output: folder for PNG files; created if it does not exist.
        dimensions: m of the models whose dimensionalities and training are drawn; a middle one if not given.
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
    chosen = plan.dimensions[len(plan.dimensions) // 2 - 1] if dimensions is None else dimensions
    if chosen not in plan.dimensions:
        raise ValueError(message("draw", "dimensions", f"be one of {plan.dimensions}", chosen))
    target.mkdir(parents=True, exist_ok=True)
    written = [
        saturation_figure(read_rows(source / MODELS), target / "saturation.png"),
        linearity_figure(read_rows(source / CLUSTERS), target / "linearity.png"),
    ]
    if plan.checkpoints:
        written.append(dimensionality_figure(source, chosen, target / "dimensionality.png"))
        _, _, group, index = min(trained(source, chosen), key=lambda run: (abs(run[0] - sparsity), run[1]))
        kept = history(group)
        evolution = spectral_evolution([step for step, _, _ in kept], [weight[index] for _, weight, _ in kept])
        written.append(evolution_figure(evolution, target / "evolution.png"))
    return written


def by_sparsity(rows: Rows) -> str:
    """A Markdown table of models.csv: means over m and seeds at each sparsity, and the lowest saturation."""
    columns = ("represented", "localization", "residual", "r_squared", "slope_error")
    lines = [
        "| S | Σ D / m | lowest | represented / n | localization | residual CV | R² | kλ − 1, absolute |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for sparsity in sorted({row["sparsity"] for row in rows}):
        mine = [row for row in rows if row["sparsity"] == sparsity]
        full = [row["dimensionality"] / row["dimensions"] for row in mine]
        share, *others = (_mean([row[name] for row in mine]) for name in columns)
        values = [_mean(full), min(full), share / mine[0]["features"], *others]
        lines.append(f"| {sparsity:g} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
    return "\n".join(lines)


def saturation_figure(rows: Rows, path: Path) -> Path:
    """Fig. 5: Σ_i D_i / m against sparsity, one line for each m (mean over seeds), beside the paper's value, 1."""
    plt = _pyplot()
    figure, (lines, counts) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(2, 1))
    sizes = sorted({row["dimensions"] for row in rows})
    for index, m in enumerate(sizes):
        mine = [row for row in rows if row["dimensions"] == m]
        sparsities = sorted({row["sparsity"] for row in mine})
        means = [_mean([row["dimensionality"] / m for row in mine if row["sparsity"] == S]) for S in sparsities]
        lines.plot(sparsities, means, "o-", ms=3, lw=1, color=plt.cm.viridis(index / len(sizes)), label=f"m = {m:.0f}")
    for axis, place in ((lines, lines.axhline), (counts, counts.axvline)):
        place(1, color="crimson", ls="--", lw=1, label="paper: Σ D = m" if axis is lines else None)
    lines.set(xlabel="sparsity S", ylabel="Σ D / m")
    lines.legend(fontsize=7, ncol=3)
    counts.hist([row["dimensionality"] / row["dimensions"] for row in rows], bins=40)
    counts.set(xlabel="Σ D / m", ylabel=f"models, of {len(rows)}")
    return _save(figure, path)


def linearity_figure(rows: Rows, path: Path) -> Path:
    """Fig. 6: R² of D = ‖w‖²/λ against localization, one point for each cluster, |kλ − 1| as its error bar."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    x, y, error, colour = (
        [row[name] for row in rows] for name in ("localization", "r_squared", "slope_error", "sparsity")
    )
    axis.errorbar(x, y, yerr=error, fmt="none", ecolor="0.8", elinewidth=0.6, zorder=1)
    points = axis.scatter(x, y, c=colour, s=7, cmap="viridis", zorder=2)
    figure.colorbar(points, label="sparsity S")
    axis.set(xlabel="localization: mean of max p over the cluster", ylabel="R² of D = ‖w‖²/λ")
    axis.set_ylim(bottom=max(-1.0, axis.get_ylim()[0]))
    return _save(figure, path)


def dimensionality_figure(folder: Path, dimensions: int, path: Path) -> Path:
    """Every feature's D_i against 1/(1 − S), with the values of exact figures as lines (Elhage et al., 2022)."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    runs = sorted(trained(folder, dimensions), key=lambda run: run[:2])
    for sparsity, _, group, index in runs:
        D = fractional_dimensionality(final_weights(group, index), dtype=torch.float64)
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
    figure.tight_layout()
    figure.savefig(path, **_LOOK)
    _pyplot().close(figure)
    return path


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
