"""What is kept of a sweep's training, and the pictures drawn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from thought_kernels.cli import app
from thought_kernels.spectral.frames import fractional_dimensionality
from thought_kernels.spectral.toy import Schedule, history, spectral_evolution, sweep
from thought_kernels.spectral.toy.evolution_rows import evolution_rows, read_evolution
from thought_kernels.spectral.toy.figures import save
from thought_kernels.spectral.toy.plans import Plan, build, groups
from thought_kernels.spectral.toy.training_figures import dimensionality_figure, evolution_figure

PLAN = Plan(80, (3, 40), (0.0, 0.5, 0.9), 2, Schedule(12, 16, 1e-2), checkpoints=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep")
    sweep(PLAN, path, progress=False)
    return path


def values(rows: list[dict[str, Any]], **wanted: object) -> list[float]:
    return [row["value"] for row in rows if wanted.items() <= row.items()]


def test_rows_are_what_spectral_evolution_finds(folder: Path, tmp_path: Path) -> None:
    written = tmp_path / "evolution.csv"
    command = ["toy", "evolution", str(folder), "-o", str(written), "--dimensions", "40", "--sparsity", "0.55"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = read_evolution(written)
    assert {row["dimensions"] for row in rows} == {40} and {row["features"] for row in rows} == {80}
    (group,) = [group for group in groups(PLAN, 32) if group.dimensions == 40]
    index = group.runs.index((0.5, 0))
    kept = history(folder / group.name)
    steps = [step for step, _, _ in kept]
    found = spectral_evolution(steps, [W[index] for _, W, _ in kept])

    told = [row for row in rows if row["quantity"] == "eigenvalue"]
    assert {(row["sparsity"], row["seed"]) for row in told} == {(0.5, 0)}
    for time, step in enumerate(steps):
        some = values(told, step=step)
        assert len(some) == 32 and some == sorted(some)
        ordered = found.eigenvalues[time].sort().values
        expected = [float(ordered[round(row["level"] * 39)]) for row in told if row["step"] == step]
        assert some == pytest.approx(expected, rel=1e-3)
        assert values(rows, quantity="rayleigh", step=step, level=1) == pytest.approx(
            [float(found.rayleigh[time].max())], rel=1e-3
        )
    for name, of_step in (("jump", found.jump), ("volatility", found.volatility)):
        for share in (0.5, 0.9, 1.0):
            expected = of_step.quantile(share, dim=1).tolist()
            assert values(rows, quantity=name, level=share) == pytest.approx(expected, rel=1e-3)
    assert values(rows, quantity="saturation") == pytest.approx(found.saturation.tolist(), rel=1e-3)


def test_dimensionalities_are_told_before_and_after_of_every_model(folder: Path) -> None:
    rows = [row for row in evolution_rows(folder, [3]) if row["quantity"] == "dimensionality"]
    assert {(row["sparsity"], row["seed"]) for row in rows} == {(S, seed) for S in PLAN.sparsities for seed in (0, 1)}
    assert {row["step"] for row in rows} == {0, 12} and len(rows) == 6 * 2 * 64
    (group,) = [group for group in groups(PLAN, 32) if group.dimensions == 3]
    D = fractional_dimensionality(build(PLAN, group).weight[group.runs.index((0.9, 1))], dtype=torch.float64)
    assert max(values(rows, sparsity=0.9, seed=1, step=0)) == pytest.approx(float(D.max()), rel=1e-3)


def test_chance_jumps_are_those_of_unrelated_models(folder: Path) -> None:
    """Of 40 dimensions: unrelated eigenspaces leave about what random ones do, training for a few steps far less."""
    rows = evolution_rows(folder, [40])
    (chance,) = values(rows, quantity="untrained jump", level=0.5)
    assert chance > 0.05 and max(values(rows, quantity="jump", level=0.5)) < chance
    (volatility,) = values(rows, quantity="untrained volatility", level=0.5)
    assert volatility > max(values(rows, quantity="volatility", level=0.5))


def test_what_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"evolution_rows: dimensions must be one of \(3, 40\), got 5"):
        evolution_rows(folder, [5])
    with pytest.raises(ValueError, match="evolution_figure: rows must hold the training of a model, got none"):
        evolution_figure([])


def test_pictures_have_a_column_for_each_model_and_show_the_untrained_ones(folder: Path, tmp_path: Path) -> None:
    rows = evolution_rows(folder, [3, 40], [0.0, 0.9])
    axes = evolution_figure(rows).axes
    assert [axis.get_title() for axis in axes[:4]] == [
        "m = 3, S = 0", "m = 3, S = 0.9", "m = 40, S = 0", "m = 40, S = 0.9",
    ]  # fmt: skip
    highest = max(row["value"] for row in rows if row["quantity"] in ("jump", "untrained jump"))
    assert all(axis.get_ylim()[1] >= highest for axis in axes[8:12])
    one = [row for row in rows if (row["dimensions"], row["sparsity"]) == (40, 0.9)]
    spectrum, _, jumps, _ = evolution_figure(one).axes
    first = sorted(line.get_ydata()[0] for line in spectrum.lines)
    assert first == values(one, quantity="eigenvalue", step=0)
    (chance,) = values(one, quantity="untrained jump", level=0.5)
    assert any(line.get_label() == "untrained" and line.get_ydata()[0] == chance for line in jumps.lines)
    before, after, *_ = dimensionality_figure(rows, 40).axes[0].lines
    assert sorted(before.get_ydata()) == sorted(values(rows, dimensions=40, quantity="dimensionality", step=0))
    assert sorted(after.get_ydata()) == sorted(values(rows, dimensions=40, quantity="dimensionality", step=12))
    path = save(dimensionality_figure(rows, 40), tmp_path / "picture.png", "drawn from 0123")
    assert b"drawn from 0123" in path.read_bytes() and [*tmp_path.iterdir()] == [path]
