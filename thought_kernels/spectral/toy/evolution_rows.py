"""The training of saved models as rows of a table, few enough to be kept beside the pictures drawn from them.

Of each quantity at each checkpoint there are some order statistics or quantiles: `level` is the share of values at or
below, from 0 to 1. Beside a model's jumps and volatility stand those of chance: as many untrained models of its shape,
one after the other, as a volatility is taken over.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from thought_kernels.ops.library import message
from thought_kernels.spectral.frames import fractional_dimensionality
from thought_kernels.spectral.toy.evolution import WINDOW, Evolution, spectral_evolution
from thought_kernels.spectral.toy.plans import Group, Plan, build
from thought_kernels.spectral.toy.sweeps import read_plan, trained
from thought_kernels.spectral.toy.training import history

Rows = list[dict[str, Any]]
SHARES = (0.5, 0.9, 1.0)  # of features, whose jumps and volatility lie below
_LINES = 32  # order statistics of eigenvalues and of Rayleigh quotients
_POINTS = 64  # of dimensionalities


def evolution_rows(
    folder: str | os.PathLike[str], dimensions: Sequence[int] = (), sparsities: Sequence[float] = (0.9,)
) -> Rows:
    """What pictures of the training of a sweep's models show.

    Args:
        folder: of a sweep with checkpoints.
        dimensions: m of the models; a middle one if none is given.
        sparsities: of the models whose training is told, the nearest ones are taken, of their first seed. Of all others
            of an m only the dimensionalities are, at the first checkpoint, which is the untrained model, and the last.

    Returns:
        A row for each (m, S, seed, quantity, level, step), its value to four digits. Quantities: "eigenvalue",
        "rayleigh", "saturation", "jump", "volatility", "untrained jump", "untrained volatility", "dimensionality".

    Raises:
        ValueError: a folder without a sweep, without models of that m, or without two checkpoints.
    """
    plan, _ = read_plan(folder)
    chosen = dimensions or [plan.dimensions[len(plan.dimensions) // 2 - 1]]
    near = {min(plan.sparsities, key=lambda known: abs(known - wanted)) for wanted in sparsities}
    rows: Rows = []
    for m in chosen:
        if m not in plan.dimensions:
            raise ValueError(message("evolution_rows", "dimensions", f"be one of {plan.dimensions}", m))
        for sparsity, seed, group, index in sorted(trained(folder, m), key=lambda run: run[:2]):
            setting = {"features": plan.features, "dimensions": m, "sparsity": sparsity, "seed": seed}
            kept = [(step, weight[index]) for step, weight, _ in history(group)]
            told = _ends(kept)
            if seed == 0 and sparsity in near:
                told = [*_course(kept), *_chance(plan, m, sparsity), *told]
            rows += [{**setting, **row} for row in told]
    return rows


def read_evolution(path: str | os.PathLike[str]) -> Rows:
    """The rows as they were written, their numbers as floats."""
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {name: value if name == "quantity" else float(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


def _ends(kept: list[tuple[int, Tensor]]) -> Rows:
    """Dimensionalities before and after."""
    rows: Rows = []
    for step, W in (kept[0], kept[-1]):
        rows += _thinned("dimensionality", step, fractional_dimensionality(W, dtype=torch.float64), _POINTS)
    return rows


def _course(kept: list[tuple[int, Tensor]]) -> Rows:
    steps, weights = zip(*kept, strict=True)
    found = spectral_evolution(steps, weights)
    rows: Rows = []
    for step, eigenvalues, kappa in zip(steps, found.eigenvalues, found.rayleigh, strict=True):
        rows += [*_thinned("eigenvalue", step, eigenvalues, _LINES), *_thinned("rayleigh", step, kappa, _LINES)]
    rows += [_row("saturation", 1, step, value) for step, value in zip(steps, found.saturation.tolist(), strict=True)]
    return rows + list(_quantiles("", steps[1:], found))


def _chance(plan: Plan, m: int, sparsity: float) -> Rows:
    """The last jump and the last volatility of untrained models in a row, whose seeds follow one another."""
    runs = tuple((sparsity, seed) for seed in range(WINDOW + 1))
    weights = build(plan, Group("untrained", m, runs)).weight
    found = spectral_evolution(range(len(runs)), list(weights))
    last = found._replace(jump=found.jump[-1:], volatility=found.volatility[-1:])
    return list(_quantiles("untrained ", [0], last))


def _quantiles(prefix: str, steps: Sequence[int], found: Evolution) -> Iterator[dict[str, Any]]:
    for name, values in (("jump", found.jump), ("volatility", found.volatility)):
        for step, of_step in zip(steps, values, strict=True):
            for share in SHARES:
                yield _row(prefix + name, share, step, float(of_step.quantile(share)))


def _thinned(name: str, step: int, values: Tensor, count: int) -> Rows:
    """At most ``count`` order statistics, the least and the largest among them."""
    ordered, last = values.sort().values, max(len(values) - 1, 1)
    places = torch.linspace(0, len(values) - 1, min(count, len(values))).round().long()
    return [_row(name, place / last, step, float(ordered[place])) for place in places.tolist()]


def _row(quantity: str, level: float, step: int, value: float) -> dict[str, Any]:
    return {"quantity": quantity, "level": float(f"{level:.4g}"), "step": step, "value": float(f"{value:.4g}")}
