"""A sweep of toy models that stops and goes on, what is said of its models, and the pictures of it."""

from __future__ import annotations

import csv
import json
import math
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from thought_kernels.cli import app
from thought_kernels.spectral import saturation
from thought_kernels.spectral.nulls import shuffled
from thought_kernels.spectral.toy import Schedule, geometries, history, spectral_evolution, sweep, toy_models, train
from thought_kernels.spectral.toy.cost import estimate, training_seconds
from thought_kernels.spectral.toy.drift import measure_drift
from thought_kernels.spectral.toy.evolution import wasserstein
from thought_kernels.spectral.toy.geometries import Found, Setting, figure, find_geometries
from thought_kernels.spectral.toy.plans import PRESETS, Plan, build, changed, groups
from thought_kernels.spectral.toy.summary import summarize
from thought_kernels.spectral.toy.sweeps import final_weights, most_varied, read_rows, trained

TINY = Plan(12, (2, 3), (0.0, 0.5, 0.9), 2, Schedule(12, 16, 1e-2), checkpoints=4)


def ring(count: int, height: float, turn: float) -> Tensor:
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count) + turn
    return torch.stack([angle.cos(), angle.sin(), torch.full((count,), height, dtype=torch.float64)])


def test_the_papers_plan_is_3200_runs() -> None:
    plan = PRESETS["paper"]
    assert len(plan) == 3200
    assert (len(plan.dimensions), min(plan.dimensions), max(plan.dimensions)) == (32, 16, 512)
    assert (len(plan.sparsities), min(plan.sparsities), max(plan.sparsities)) == (50, 0.0, 0.99)
    runs = [(group.dimensions, *run) for group in groups(plan, 100) for run in group.runs]
    assert len(set(runs)) == 3200
    assert len(groups(plan, 100)) == 32
    need = estimate(plan, 100)
    # 100 models of 512 x 1024, their gradients and two moments, and three tensors of samples
    assert need.memory > 100 * 4 * 1024 * (4 * 512 + 3 * 1024)
    assert need.disk > 3200 * 4 * 1024 * 264 * 3


def test_a_sweep_that_stops_ends_the_same(tmp_path: Path) -> None:
    models, clusters, nulls, null_clusters = sweep(TINY, tmp_path / "whole", progress=False)
    sweep(TINY, tmp_path / "cut", models_at_once=4, progress=False)  # other groups, the same models
    done = tmp_path / "cut" / "m0003-001"
    (done / "rows.json").unlink()  # as if it had stopped here,
    (tmp_path / "cut" / "models.csv").unlink()
    before = (tmp_path / "cut" / "m0002-000" / "rows.json").stat().st_mtime_ns
    again, *_ = sweep(TINY, tmp_path / "cut", progress=False)
    assert (tmp_path / "cut" / "m0002-000" / "rows.json").stat().st_mtime_ns == before  # what was done is not redone

    first, second = (
        sorted(read_rows(path), key=lambda row: (row["dimensions"], row["sparsity"], row["seed"]))
        for path in (models, again)
    )
    assert len(first) == len(TINY) == 12
    for a, b in zip(first, second, strict=True):
        # float32 sums in another order over 12 steps of Adam
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)
    assert {row["dimensions"] for row in read_rows(clusters)} == {2.0, 3.0}
    beside = read_rows(nulls)
    assert len(beside) == 2 * len(TINY) and {row["shuffled"] for row in beside} == {0.0, 1.0}
    for row in beside:
        group, index = next(
            (group, group.runs.index((row["sparsity"], int(row["seed"]))))
            for group in groups(TINY, 32)
            if group.dimensions == row["dimensions"]
        )
        W = build(TINY, group).weight[index]
        if row["shuffled"]:
            W = shuffled(final_weights(tmp_path / "whole" / group.name, index), int(row["seed"]))
        assert row["saturation"] == pytest.approx(saturation(W), rel=1e-5)
        setting = ("dimensions", "sparsity", "seed", "shuffled")
        mine = [r for r in read_rows(null_clusters) if all(r[name] == row[name] for name in setting)]
        expected = [cluster["residual"] for cluster in summarize(W)[1]]
        assert [cluster["residual"] for cluster in mine] == pytest.approx(expected, rel=1e-5)
    for m in TINY.dimensions:
        for sparsity, seed, group, index in trained(tmp_path / "whole", m):
            W = final_weights(group, index)
            (row,) = [r for r in first if (r["dimensions"], r["sparsity"], r["seed"]) == (m, sparsity, seed)]
            assert row["saturation"] == pytest.approx(summarize(W)[0].saturation, rel=1e-5)
    with pytest.raises(ValueError, match="sweep: output must hold this plan's sweep, got another schedule"):
        sweep(changed(TINY, steps=13), tmp_path / "cut", progress=False)


@pytest.mark.parametrize(
    "change",
    [
        {"features": 0}, {"dimensions": ()}, {"dimensions": (2, 0)}, {"sparsities": (0.5, 1.0)}, {"seeds": 0},
        {"sparsities": ("half",)}, {"checkpoints": -1}, {"spread": 0.5}, {"spread": float("nan")},
    ],
)  # fmt: skip
def test_bad_plans_are_refused(change: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^Plan: {next(iter(change))} must .*, got "):
        changed(TINY, **change)


def test_damaged_records_are_named(tmp_path: Path) -> None:
    small = changed(TINY, dimensions=(2,), sparsities=(0.5,), seeds=1, steps=1, checkpoints=0)
    sweep(small, tmp_path, progress=False)
    for path in (tmp_path / "m0002-000" / "rows.json", tmp_path / "plan.json"):
        for text in ('{"models": [', "[]"):
            path.write_text(text)
            with pytest.raises(ValueError, match=f"^sweep: {path} must be a whole record of a sweep, got another file"):
                sweep(small, tmp_path, progress=False)


def test_a_group_of_an_older_record_is_summarised_again(tmp_path: Path) -> None:
    small = changed(TINY, dimensions=(2,), sparsities=(0.5,), seeds=1, steps=1, checkpoints=0)
    wanted = [path.read_bytes() for path in sweep(small, tmp_path, progress=False)]
    path = tmp_path / "m0002-000" / "rows.json"
    record = json.loads(path.read_text())
    del record["null_clusters"]
    path.write_text(json.dumps(record))
    assert [path.read_bytes() for path in sweep(small, tmp_path, progress=False)] == wanted


def test_the_time_of_a_plan_is_told_beforehand() -> None:
    plan = changed(TINY, steps=400)
    short = training_seconds(plan, torch.device("cpu"), 6, steps=20)
    start = time.perf_counter()
    for group in groups(plan, 6):
        train(build(plan, group), plan.schedule)
    took = time.perf_counter() - start
    assert took / 30 < short < 30 * took  # other work on the machine may slow either


def test_drift_of_plain_descent_is_the_flows(tmp_path: Path) -> None:
    """Along a run by Adam: what the flow says holds for plain descent from each checkpoint."""
    sweep(TINY, tmp_path, progress=False)
    path = tmp_path / "drift.csv"
    result = CliRunner().invoke(app, ["toy", "drift", str(tmp_path), "-o", str(path), "--dimensions", "3"])
    assert result.exit_code == 0, result.output
    rows = read_rows(path)
    assert len(rows) == 6 * (len(history(tmp_path / "m0003-000")) - 1)
    for row in rows:
        # Descent goes a thousandth of ‖M‖ in ten steps; curvature bends it by a few times that.
        assert row["descent_error"] < 0.05 and row["descent_eigenvalues"] < 0.05
        assert 0 < row["eigenvalue_share"] <= 1 + 1e-6
        assert -1 <= row["gram"] <= 1 and -1 <= row["eigenvalues"] <= 1
        assert 0 <= row["transport"] <= 1 and 0 <= row["fixed_point"] <= 2
    # The theorems are about derivatives: what they leave out falls with the way that is gone.
    for name in ("error", "eigenvalues"):
        near, far = (sum(row[f"{way}_{name}"] for row in rows) for way in ("nearer", "descent"))
        assert 0.05 < near / far < 0.2, name
    assert max(row["gram"] for row in rows) > 0.3  # Adam goes downhill too
    bad = CliRunner().invoke(app, ["toy", "drift", str(tmp_path), "-o", str(path), "--dimensions", "9"])
    assert bad.exit_code == 1 and "drift_rows: dimensions must be one of (2, 3), got 9" in bad.output
    with pytest.raises(ValueError, match="measure_drift: steps, weights and biases must be two or more of each"):
        measure_drift([0], [], [], torch.ones(1, 3), torch.ones(3))


def test_nonuniform_sparsity_spreads_around_the_mean() -> None:
    plan = changed(TINY, spread=9.0)
    models = build(plan, groups(plan, 6)[0])
    active = 1 - models.sparsity.double()
    assert active.shape == (6, 12)
    for row, (sparsity, _) in zip(active, groups(plan, 6)[0].runs, strict=True):
        assert row[0] == pytest.approx((1 - sparsity) / 3, rel=1e-5)
        assert row[-1] == pytest.approx(min(1.0, (1 - sparsity) * 3), rel=1e-5)
        assert (row.diff() >= -1e-7).all()
    uniform = build(TINY, groups(TINY, 6)[0])
    torch.testing.assert_close(uniform.weight, models.weight)


def test_the_most_varied_inputs() -> None:
    """p/3 − p²/4 is largest at p = 2/3."""
    sparsity = torch.tensor([0.0, 1 / 3, 0.5, 0.9, 0.99])
    W = torch.tensor([[0.1, 1.0, 1.0, 0.9, 0.2]])
    assert most_varied(W, sparsity) == 2  # of features 1, 2 and 3; 0 varies more than 3
    assert most_varied(W.flip(1), sparsity) == 2


def test_clusters_carry_their_spread_and_their_residual() -> None:
    """Two eigenvalues of one window, and a feature between two eigenspaces."""
    values = torch.tensor([1.0, 0.99, 0.5], dtype=torch.float64)
    W = torch.cat([values.sqrt().diag(), torch.zeros(3, 1, dtype=torch.float64)], 1)
    summary, clusters = summarize(W, rtol=0.02)
    assert [cluster["spread"] for cluster in clusters] == pytest.approx([0.01, 0], abs=1e-9)
    assert [cluster["residual"] for cluster in clusters] == pytest.approx([0, 0], abs=1e-9)
    assert summary.spread == pytest.approx(0.02 / 3, abs=1e-9) and summary.tight == 1
    W[:, 3] = torch.tensor([0.6, 0.0, 0.6])
    summary, clusters = summarize(W, rtol=0.02)
    assert max(cluster["residual"] for cluster in clusters) > 0.3 and summary.tight < 1
    assert 0 < summary.held_01 <= (1 - summary.saturation) / 0.1


def test_a_tight_frame_is_saturated_and_linear() -> None:
    W = torch.block_diag(1.1 * ring(5, 0, 0.3)[:2], 0.8 * ring(3, 0, 0.1)[:2], torch.eye(1, dtype=torch.float64))
    W = torch.cat([W, torch.full((5, 1), 1e-4, dtype=torch.float64)], 1)  # a feature given up in training
    summary, clusters = summarize(W, rtol=1e-3)
    assert (summary.rank, summary.represented, summary.eigenspaces) == (5, 9, 3)
    assert summary.saturation == pytest.approx(1, abs=1e-4)
    assert summary.localization == pytest.approx(1, abs=1e-6)
    assert summary.r_squared == pytest.approx(1, abs=1e-6)
    assert sorted((row["members"], row["dimension"]) for row in clusters) == [(1, 1), (3, 2), (5, 2)]
    spread, _ = summarize(torch.randn(5, 30, generator=torch.Generator().manual_seed(0)), rtol=1e-3)
    assert spread.saturation < 0.97
    assert spread.localization < 0.9


def test_evolution_of_a_feature_that_moves() -> None:
    """Two orthogonal features, one of which turns onto the other's direction while norms stay."""
    weights = [
        torch.tensor([[2.0, 0.0], [0.0, 1.0]]),
        torch.tensor([[2.0, 1.0], [0.0, 0.0]]),
        torch.tensor([[2.0, 1.0], [0.0, 0.0]]),
    ]
    found = spectral_evolution([0, 1, 5], weights)
    torch.testing.assert_close(found.eigenvalues, torch.tensor([[4.0, 1.0], [5.0, 0.0], [5.0, 0.0]]).double())
    torch.testing.assert_close(found.rayleigh, torch.tensor([[4.0, 1.0], [5.0, 5.0], [5.0, 5.0]]).double())
    # from λ = 4 to 5 over a mean of 4.5, and from 1 to 5 over 3
    torch.testing.assert_close(found.jump, torch.tensor([[1 / 4.5, 4 / 3], [0.0, 0.0]]).double())
    assert (found.volatility[0] == 0).all()
    expected = torch.tensor([[math.log(5 / 4), math.log(5)], [0.0, 0.0]]).double().std(0)
    torch.testing.assert_close(found.volatility[1], expected)
    torch.testing.assert_close(found.saturation, torch.ones(3).double())


def test_jumps_bound_changes_of_the_rayleigh_quotient() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(4, 9, generator=generator) for _ in range(2))
    found = spectral_evolution([0, 1], [first, second])
    change = found.rayleigh.diff(dim=0).abs() / found.rayleigh.mean(0)
    assert (found.jump >= change * (1 - 1e-9)).all()
    with pytest.raises(ValueError, match="spectral_evolution: steps and weights must be two or more of each"):
        spectral_evolution([0], [first])
    with pytest.raises(ValueError, match="spectral_evolution: window must be at least 2"):
        spectral_evolution([0, 1], [first, second], window=1)


def test_wasserstein_of_point_masses() -> None:
    values, others = torch.tensor([1.0, 3.0]), torch.tensor([2.0])
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    torch.testing.assert_close(wasserstein(values, weights, others, torch.ones(2, 1)), torch.tensor([1.0, 1.0]))


def test_antiprisms_are_named_tight_or_not() -> None:
    for height in (2**-0.5, 0.55):  # tight at 1/√2, and flat
        W = torch.cat([ring(4, height, 0.2), ring(4, -height, 0.2 + math.pi / 4)], 1)
        assert figure(W) == "square antiprism"
        W = torch.cat([ring(4, height, 0.2), ring(4, -height, 0.2)], 1)
        assert figure(W) != "square antiprism"
    assert figure(torch.cat([ring(5, 0, 0.1)[:2], 0.01 * torch.ones(2, 1)], 1)) == "pentagon"
    assert figure(torch.randn(3, 8, generator=torch.Generator().manual_seed(0))) is None


def test_a_pentagon_is_found_by_training() -> None:
    found = find_geometries(
        Setting("pentagon", 5, 2, 0.95), seeds=8, schedule=Schedule(800, batch=128, learning_rate=2e-2)
    )
    assert found.counts.get("pentagon", 0) >= 4, found
    assert found.untrained == {"none": 8}
    assert found.dimensionality == pytest.approx(2 / 5, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "at_least"),
    [
        (Setting("digon", 2, 1, 0.9), 8),
        (Setting("triangle", 3, 2, 0.4), 3),
        (Setting("tetrahedron", 4, 3, 0.4), 1),
        (Setting("square antiprism", 8, 3, 0.9), 8),
    ],
)
def test_geometries_found_by_training(setting: Setting, at_least: int) -> None:
    found = find_geometries(setting, seeds=32)
    assert found.counts.get(setting.figure, 0) >= at_least, found
    assert found.dimensionality == pytest.approx(setting.dimensions / setting.features, abs=0.02)


@pytest.mark.slow
def test_trained_models_saturate() -> None:
    """The paper's empirical finding (not a theorem), at a small size."""
    models = toy_models(64, 8, [0.1, 0.5, 0.8, 0.95], seeds=range(4), streams=[0] * 4)
    before = [summarize(W)[0].saturation for W in models.weight]
    train(models, Schedule(3000, batch=128, learning_rate=3e-3))
    after = [summarize(W)[0].saturation for W in models.weight]
    assert min(after) > 0.98
    assert max(before) < 0.97


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        found = CliRunner().invoke(app, ["toy", *map(str, arguments)])
        return found.exit_code, found.output

    folder, pictures = tmp_path / "sweep", tmp_path / "pictures"
    code, said = run("sweep", "--preset", "paper", "--output", folder, "--dry-run", "--device", "cpu")
    assert code == 0 and "3200 models" in said and not folder.exists()
    code, said = run("figures", folder, "--output", pictures)
    assert code == 1 and "draw: folder must hold a finished sweep" in said
    monkeypatch.setitem(PRESETS, "reduced", TINY)
    code, said = run("sweep", "--output", folder, "--device", "cpu")
    assert code == 0 and "12 models" in said and str(folder / "models.csv") in said
    code, said = run("sweep", "--output", folder, "--steps", 13, "--device", "cpu")
    assert code == 1 and "sweep: output must hold this plan's sweep, got another schedule" in said
    code, said = run("figures", folder, "--output", pictures)
    assert code == 0 and "| S | Σ D / m |" in said
    assert sorted(path.name for path in pictures.iterdir()) == [
        "dimensionality.png", "evolution.png", "linearity.png", "residue.png", "saturation.png",
    ]  # fmt: skip
    (folder / "null_clusters.csv").unlink()  # as sweeps of before there was one
    code, said = run("figures", folder, "--output", tmp_path / "older", "--dimensions", 2, "--dimensions", 3)
    assert code == 0 and len(list((tmp_path / "older").iterdir())) == 7
    code, said = run("figures", folder, "--output", pictures, "--dimensions", "5")
    assert code == 1 and "draw: dimensions must be one of" in said
    for device in ("nowhere", "meta"):
        code, said = run("sweep", "--output", tmp_path / "other", "--device", device)
        assert code == 1 and f"sweep: device must be one that torch can use here, got '{device}'" in said
    assert not (tmp_path / "other").exists()
    code, said = run("geometries", "--output", tmp_path / "none" / "found.csv")
    assert code == 2 and "must be a file in a folder" in said
    with open(folder / "models.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(TINY)


def test_geometries_are_taken_up_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Setting] = []
    short = Schedule(40, batch=32, learning_rate=2e-2)

    def counted(setting: Setting, *, seeds: int) -> Found:
        trained.append(setting)
        return find_geometries(setting, seeds=seeds, schedule=short)

    monkeypatch.setattr(geometries, "find_geometries", counted)
    path = tmp_path / "geometries.csv"
    first = CliRunner().invoke(app, ["toy", "geometries", "-o", str(path), "--seeds", "2"])
    assert first.exit_code == 0 and len(trained) == len(geometries.SETTINGS)
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    assert lines[0].split(",")[6] == "untrained" and sum(int(line.split(",")[6]) for line in lines[1:]) == 2 * 5
    path.write_text("".join(line for line in lines if not line.startswith("8,")))  # the last setting is n = 8
    again = CliRunner().invoke(app, ["toy", "geometries", "-o", str(path), "--seeds", "2"])
    assert again.exit_code == 0 and trained[len(geometries.SETTINGS) :] == [geometries.SETTINGS[-1]]
    assert path.read_text() == whole

    rows = [[cell for place, cell in enumerate(line.split(",")) if place != 6] for line in lines]
    path.write_text("".join(",".join(row) for row in rows))  # as before untrained models were looked at
    assert CliRunner().invoke(app, ["toy", "geometries", "-o", str(path), "--seeds", "2"]).exit_code == 0
    assert path.read_text() == whole

    def stopped(setting: Setting, *, seeds: int) -> Found:
        if setting.features == 3:
            raise KeyboardInterrupt
        return counted(setting, seeds=seeds)

    path.write_text("".join(line for line in lines if not line.startswith(("2,", "3,"))))
    monkeypatch.setattr(geometries, "find_geometries", stopped)
    assert CliRunner().invoke(app, ["toy", "geometries", "-o", str(path), "--seeds", "2"]).exit_code != 0
    assert path.read_text() == "".join(line for line in lines if not line.startswith("3,"))  # nothing else is lost
