"""Pictures of the training of toy models, from the rows of evolution_rows."""

from __future__ import annotations

from typing import Any

from thought_kernels.ops.library import message
from thought_kernels.spectral.toy.evolution_rows import SHARES, Rows

PLATEAUS = {"tetrahedron 3/4": 3 / 4, "triangle 2/3": 2 / 3, "digon 1/2": 1 / 2, "pentagon 2/5": 2 / 5,
            "antiprism 3/8": 3 / 8}  # fmt: skip


def evolution_figure(rows: Rows) -> Any:
    """Eigenvalues, Rayleigh quotients, jumps and volatility along training, a column for each model (SS appendix I).

    Step 0 is the untrained model; grey in the lower two are untrained models one after the other.

    Args:
        rows: of evolution_rows.

    Returns:
        A matplotlib figure; `save` of figures.py writes it.

    Raises:
        ValueError: rows without the training of a model.
    """
    from matplotlib.figure import Figure

    models = sorted({(row["dimensions"], row["sparsity"]) for row in rows if row["quantity"] == "eigenvalue"})
    if not models:
        raise ValueError(message("evolution_figure", "rows", "hold the training of a model", "none"))
    if len(models) == 1:
        figure = Figure(figsize=(10, 6), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True).reshape(4, 1)
    else:
        figure = Figure(figsize=(3.2 * len(models), 9), layout="constrained")
        axes = figure.subplots(4, len(models), sharex=True, sharey="row")
    for column, (m, sparsity) in zip(axes.T, models, strict=True):
        _evolution(column, [row for row in rows if (row["dimensions"], row["sparsity"]) == (m, sparsity)])
        column[0].set_title(f"m = {m:g}, S = {sparsity:g}", fontsize=9)
    for axis, name in zip(axes[:, 0], ("eigenvalues of F", "Rayleigh quotients κ", "jump", "volatility"), strict=True):
        axis.set_ylabel(name)
    for axis in axes[2:].flat:  # once all is drawn: a limit holds for the columns beside it, and for what comes after
        axis.set_ylim(bottom=0)
    axes[2, 0].legend(fontsize=7)
    return figure


def _evolution(axes: Any, rows: Rows) -> None:
    """One model's column."""
    for axis, quantity, style in (
        (axes[0], "eigenvalue", {"lw": 0.7, "color": "C0"}), (axes[1], "rayleigh", {"lw": 0.5, "color": "C1"}),
    ):  # fmt: skip
        for level in sorted({row["level"] for row in rows if row["quantity"] == quantity}):
            axis.plot(*_line(rows, quantity, level), **style)
    for axis, quantity in ((axes[2], "jump"), (axes[3], "volatility")):
        for share, dashes in zip(SHARES, ("-", "--", ":"), strict=True):
            label = "largest" if share == 1 else f"{share:.0%} of features below"
            axis.plot(*_line(rows, quantity, share), dashes, lw=1, color="C2", label=label)
            (chance,) = _line(rows, f"untrained {quantity}", share)[1]
            axis.axhline(chance, ls=dashes, lw=0.8, color="0.6", label="untrained" if share == SHARES[0] else None)
        axis.set_yscale("symlog", linthresh=1e-3)
    axes[3].set_xlabel("step")


def _line(rows: Rows, quantity: str, level: float) -> tuple[list[float], list[float]]:
    """Steps and values of one level."""
    mine = [row for row in rows if (row["quantity"], row["level"]) == (quantity, level)]
    return [row["step"] for row in mine], [row["value"] for row in mine]


def dimensionality_figure(rows: Rows, dimensions: int) -> Any:
    """Features' D_i against 1/(1 − S), with the values of exact figures as lines (Elhage et al., 2022).

    Grey: the same models before training.

    Args:
        rows: of evolution_rows.
        dimensions: m of the models.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axis = figure.subplots()
    mine = [row for row in rows if (row["quantity"], row["dimensions"]) == ("dimensionality", dimensions)]
    before = [row for row in mine if not row["step"]]
    after = [row for row in mine if row["step"]]
    axis.plot([1.07 / (1 - row["sparsity"]) for row in before], [row["value"] for row in before], ".", ms=1,
              color="0.6", alpha=0.4)  # fmt: skip
    # Spread a little, by order and not at random: features of one model would hide each other.
    places = [(0.96 + 0.08 * row["level"]) / (1 - row["sparsity"]) for row in after]
    axis.plot(places, [row["value"] for row in after], ".", ms=2, color="C0", alpha=0.5)
    for name, value in PLATEAUS.items():
        axis.axhline(value, lw=0.6, color="0.6", zorder=0)
        axis.annotate(name, (1.0, value), xycoords=("axes fraction", "data"), fontsize=6, va="center")
    axis.set(xscale="log", xlabel="1 / (1 − S)", ylabel=f"D, features of m = {dimensions:g}")
    return figure
