"""Rows kept while they are few: the same patch as from their sums, wherever and whenever they are summed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tolerances import SOLVED, largest
from torch import Tensor

from thought_kernels.estimation import estimators
from thought_kernels.estimation.accumulator import ThoughtAccumulator
from thought_kernels.estimation.kept_rows import KeptRows
from thought_kernels.estimation.sums import Sums
from thought_kernels.patches.site import SitePatch

D_OUT, D_IN = 12, 30
KEY = (0, "down")


def rows(seed: int, count: int, *, alike: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with a large common part, of which one has weight 0 and one no activation."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    activation = normal(1, D_IN) + (0 if alike else normal(count, D_IN)) + torch.zeros(count, 1)
    weights = torch.rand(count, generator=generator, dtype=torch.float64) + 0.1
    if not alike:
        weights[2], activation[1] = 0, 0
    return normal(count, D_OUT), activation, weights


def filled(*parts: tuple[Tensor, Tensor, Tensor], **options: Any) -> ThoughtAccumulator:
    accumulator = ThoughtAccumulator(**{"dtype": torch.float64, **options})
    for part in parts:
        accumulator.update(*KEY, *part)
    return accumulator


def kept(accumulator: ThoughtAccumulator) -> bool:
    return isinstance(accumulator._sums[KEY], KeptRows)


def assert_same(found: SitePatch, wanted: SitePatch) -> None:
    assert largest(found.dense() - wanted.dense()) <= SOLVED * largest(wanted.dense())
    for name in ("vector", "activation_mean"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or largest(ours - theirs) <= SOLVED * largest(theirs)
    assert found.fit.rows == wanted.fit.rows
    assert found.fit.anisotropy == pytest.approx(wanted.fit.anisotropy, abs=1e-7)
    assert found.fit.spherical_scale == pytest.approx(wanted.fit.spherical_scale)
    assert found.fit.best_scale == pytest.approx(wanted.fit.best_scale)
    assert found.fit.residual == pytest.approx(wanted.fit.residual, rel=1e-9, abs=1e-9)
    assert found.fit.condition == pytest.approx(wanted.fit.condition, rel=1e-9)
    assert (found.fit.fold_residual is None) == (wanted.fit.fold_residual is None)
    assert found.fit.fold_residual is None or found.fit.fold_residual == pytest.approx(wanted.fit.fold_residual)


@pytest.mark.filterwarnings("ignore::thought_kernels.estimation.scales.ScaleWarning")
@pytest.mark.parametrize("scale", [1.0, -0.3])
@pytest.mark.parametrize("normalization", ["none", "norm", "squared_norm"])
@pytest.mark.parametrize("estimator", estimators.ESTIMATORS)
@pytest.mark.parametrize("count", [5, 29])
def test_rows_and_their_sums_give_one_patch(count: int, estimator: str, normalization: str, scale: float) -> None:
    if estimator == "affine" and normalization != "none":
        pytest.skip("affine needs ν = 1")
    accumulator = filled(rows(0, count), normalization=normalization)
    options = {"scale": scale, "ridge": 0.3}
    assert kept(accumulator)
    found = accumulator.solve(estimator, **options).entries[KEY]
    assert kept(accumulator)  # solving is not the end of them
    sums = accumulator.sums(*KEY)
    assert sums is not None and sums.cross.shape == (D_OUT, D_IN) and not kept(accumulator)
    assert_same(found, accumulator.solve(estimator, **options).entries[KEY])


@pytest.mark.parametrize("estimator", ["ridge", "affine"])
@pytest.mark.parametrize("count", [5, 29])
def test_a_diagonal_ridge_gives_one_patch_too(count: int, estimator: str) -> None:
    accumulator, ridge = filled(rows(0, count)), torch.linspace(0.01, 2, D_IN, dtype=torch.float64)
    found = accumulator.solve(estimator, ridge=ridge)
    assert kept(accumulator) and accumulator.sums(*KEY) is not None and not kept(accumulator)
    assert_same(found.entries[KEY], accumulator.solve(estimator, ridge=ridge).entries[KEY])
    assert found.provenance["ridge"] == ridge.tolist()
    with pytest.raises(ValueError, match=rf"ridge must have one number for each of {D_IN} inputs, got 1 \(block"):
        accumulator.solve(estimator, ridge=ridge[:1])


def test_a_patch_of_few_rows_is_kept_as_factors() -> None:
    few, many = (filled(rows(0, count)).solve("ridge").entries[KEY] for count in (5, 29))
    assert few.rank == 4  # of 5 rows one has weight 0
    assert many.rank is None and many.matrix.shape == (D_OUT, D_IN)


@pytest.mark.parametrize("estimator", ["ridge", "affine", "exact"])
@pytest.mark.parametrize("counts", [(5, 7), (20, 20), (5, 40), (40, 5), (29, 0, 1)])
def test_rows_are_summed_once_they_are_as_many_as_the_activation_is_wide(counts: Any, estimator: str) -> None:
    parts = [tuple(tensor[5:] for tensor in rows(seed, 5 + count)) for seed, count in enumerate(counts)]
    accumulator = filled(*parts)
    assert kept(accumulator) == (sum(counts) < D_IN)
    whole = filled(tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    whole.sums(*KEY)
    assert_same(accumulator.solve(estimator).entries[KEY], whole.solve(estimator).entries[KEY])


@pytest.mark.parametrize("summed", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("counts", [(6, 9), (20, 20)])
def test_merging_kept_rows_and_sums_in_any_mixture(counts: tuple[int, int], summed: tuple[bool, bool]) -> None:
    parts = [rows(seed, count) for seed, count in enumerate(counts)]
    ours, theirs = (filled(part) for part in parts)
    for accumulator, early in zip((ours, theirs), summed, strict=True):
        if early:
            accumulator.sums(*KEY)
    ours.merge(theirs)
    assert kept(theirs) != summed[1]
    assert_same(ours.solve("ridge").entries[KEY], filled(*parts).solve("ridge").entries[KEY])
    empty = ThoughtAccumulator(dtype=torch.float64)
    empty.merge(theirs)
    assert_same(empty.solve("ridge").entries[KEY], theirs.solve("ridge").entries[KEY])


def test_a_state_dict_carries_them() -> None:
    accumulator = filled(rows(0, 6))
    wanted = accumulator.solve("ridge").entries[KEY]
    restored = ThoughtAccumulator(dtype=torch.float64)
    restored.load_state_dict(accumulator.state_dict())
    assert_same(restored.solve("ridge").entries[KEY], wanted)
    later = rows(1, 8)
    for each in (accumulator, restored):
        each.update(*KEY, *later)
    assert_same(restored.solve("ridge").entries[KEY], filled(rows(0, 6), later).solve("ridge").entries[KEY])


def test_equal_activations_leave_the_vector_alone() -> None:
    accumulator = filled(rows(3, 8, alike=True))
    entry = accumulator.solve("affine").entries[KEY]
    assert not entry.dense().any()
    delta, _, weights = rows(3, 8, alike=True)
    assert largest(entry.vector - weights @ delta / weights.sum()) <= SOLVED * largest(entry.vector)


def test_zero_activations_are_solved_by_zero() -> None:
    delta, activation, weights = rows(0, 8)
    accumulator = filled((delta, 0 * activation, weights))
    for estimator in ("ridge", "exact", "mean"):
        entry = accumulator.solve(estimator).entries[KEY]
        assert not entry.dense().any() and entry.fit.residual == pytest.approx(1)


@pytest.mark.filterwarnings("ignore::thought_kernels.estimation.scales.ScaleWarning")
@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("kind", ["equal", "zero", "one row"])
@pytest.mark.parametrize("estimator", estimators.ESTIMATORS)
def test_degenerate_rows_and_their_sums_give_one_patch(estimator: str, kind: str, scale: float) -> None:
    delta, activation, weights = rows(3, 8, alike=True)
    count = 1 if kind == "one row" else 8
    accumulator = filled((delta[:count], activation[:count] * (kind != "zero"), weights[:count]))
    found = accumulator.solve(estimator, scale=scale).entries[KEY]
    accumulator.sums(*KEY)
    assert_same(found, accumulator.solve(estimator, scale=scale).entries[KEY])


def test_what_is_kept_is_a_copy() -> None:
    delta, activation, weights = rows(0, 8)
    accumulator = filled((delta, activation, weights))
    wanted = accumulator.solve("ridge").entries[KEY]
    for tensor in (delta, activation, weights):
        tensor.fill_(7.0)
    assert torch.equal(accumulator.solve("ridge").entries[KEY].dense(), wanted.dense())


def test_rows_that_overflow_the_sums_dtype_are_refused() -> None:
    delta, activation, weights = rows(0, 8)
    accumulator = filled((delta, 1e300 * activation, weights), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"activation must be finite, .* overflowed torch.float32 \(block 0, site 'do"):
        accumulator.solve("ridge")


@pytest.mark.parametrize("summed", [False, True])
def test_what_overflowed_is_merged_into_nothing(summed: bool) -> None:
    part = rows(0, 8)
    ours, theirs = (ThoughtAccumulator(dtype=torch.float32) for _ in range(2))
    for accumulator in (ours, theirs):
        accumulator.update(0, "down", *part)
    theirs.update(1, "down", part[0], 1e300 * part[1], part[2])
    if summed:
        theirs.sums(1, "down")
    wanted = ours.solve("ridge")
    with pytest.raises(ValueError, match=r"^merge: other must hold finite numbers, got NaN .*; block 1, site 'down'; "):
        ours.merge(theirs)
    assert ours.layers == (0,)
    assert torch.equal(ours.solve("ridge").matrix(0, "down"), wanted.matrix(0, "down"))


def test_nan_and_other_widths_are_refused_before_anything_is_kept() -> None:
    delta, activation, weights = rows(0, 8)
    accumulator = filled((delta, activation, weights))
    wanted = accumulator.solve("ridge").entries[KEY]
    bad = activation.clone()
    bad[4, 3] = math.nan
    with pytest.raises(ValueError, match="activation must be finite in rows of nonzero weight, .* first in row 4"):
        accumulator.update(*KEY, delta, bad, weights)
    with pytest.raises(ValueError, match="activation must have width 30 as before, got 29"):
        accumulator.update(*KEY, delta, activation[:, 1:], weights)
    with pytest.raises(ValueError, match="activation must have shape"):
        accumulator.update(*KEY, delta, activation[1:], weights)
    assert torch.equal(accumulator.solve("ridge").entries[KEY].dense(), wanted.dense())
    accumulator.drop(*KEY)
    assert accumulator.layers == () and accumulator.sums(*KEY) is None


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-10])
def test_the_condition_number_is_that_of_the_eigenvalues(smallest: float) -> None:
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    gram = basis * torch.logspace(0, math.log10(smallest), 40, dtype=torch.float64) @ basis.T
    found = estimators.condition_number((gram + gram.T) / 2, rtol=1e-5)
    assert found == (pytest.approx(1 / smallest, rel=1e-6) if smallest > 1e-5 else math.inf)


@pytest.mark.parametrize("count", [400, 600])
def test_what_is_held_in_float32_is_solved_as_in_float64(count: int) -> None:
    """To 1e-6 of what the patch does to the rows: most of them is common to all, as real ones are."""
    generator = torch.Generator().manual_seed(3)
    activation = torch.randn(count, 512, generator=generator) + 3 * torch.randn(1, 512, generator=generator)
    narrow = filled((torch.randn(count, 32, generator=generator), activation, torch.ones(count)), dtype=torch.float32)
    held, gram = narrow._sums[KEY], activation.double().T @ activation.double()
    if isinstance(held, KeptRows):
        wide: KeptRows | Sums = KeptRows(held.widths, torch.float64, held.device)
        wide.add(*held.joined())
    else:
        wide = Sums(**{name: tensor.double() for name, tensor in held.tensors().items()})
    assert isinstance(held, KeptRows) == (count < 512)
    wanted = estimators.solve(wide, "ridge").dense()
    error = narrow.solve("ridge").entries[KEY].dense().double() - wanted
    assert ((error @ gram) * error).sum() <= 1e-12 * ((wanted @ gram) * wanted).sum()
