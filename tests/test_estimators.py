"""Estimators against the definition of what they minimise, computed from the rows that the sums have forgotten."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import allowed_error, largest
from torch import Tensor

from thought_kernels.estimation.accumulator import ThoughtAccumulator
from thought_kernels.estimation.estimators import DEFAULT_RIDGE, ESTIMATORS, condition_number, solve
from thought_kernels.estimation.sums import Sums
from thought_kernels.fitting.transmute import transmute

NORMALIZATIONS = ("none", "norm", "squared_norm")
# Theory §2: claims of exact interpolation are made to 1e-9 in float64.
EXACT = 1e-9


@dataclass
class Rows:
    delta: Tensor
    activation: Tensor
    weights: Tensor
    normalization: str = "none"

    @property
    def scaled_weights(self) -> Tensor:
        power = NORMALIZATIONS.index(self.normalization)
        return self.weights / self.activation.norm(dim=-1) ** power

    def sums(self, dtype: torch.dtype = torch.float64) -> Sums:
        w, v, d, a = self.weights, self.scaled_weights, self.delta, self.activation
        moments = torch.stack([w.sum(), v.sum(), (v * d.square().sum(-1)).sum(), (w != 0).sum().double()])
        cross, gram = torch.einsum("n,ni,nj->ij", v, d, a), torch.einsum("n,ni,nj->ij", v, a, a)
        return Sums(cross.to(dtype), gram.to(dtype), (w @ d).to(dtype), (w @ a).to(dtype), moments)

    def residual(self, matrix: Tensor, vector: Tensor | None) -> float:
        predicted = self.activation @ matrix.T + (0 if vector is None else vector)
        error, energy = (self.scaled_weights @ x.square().sum(-1) for x in (predicted - self.delta, self.delta))
        return float(error / energy)


def rows(n: int, d: int, seed: int = 0, normalization: str = "none", offset: float = 0.0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    delta, activation = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    return Rows(delta + offset, activation + offset, weights, normalization)


def assert_near(actual: Tensor, expected: Tensor, relative: float = EXACT) -> None:
    assert largest(actual - expected) <= relative * largest(expected)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("n", [1, 5, 8])
def test_exact_interpolates_up_to_d_tokens(n: int, normalization: str) -> None:
    r = rows(n, 8, seed=n, normalization=normalization)
    entry = solve(r.sums(), "exact", normalization=normalization)
    assert_near(r.activation @ entry.matrix.T, r.delta)
    assert entry.fit.residual <= EXACT
    assert entry.vector is None


def test_exact_is_the_token_patch_for_one_token_and_the_pseudo_inverse_for_more() -> None:
    one = rows(1, 6)
    expected = torch.outer(one.delta[0], one.activation[0]) / one.activation[0].square().sum()  # TP eq. 4
    assert_near(solve(one.sums(), "exact").matrix, expected)
    few = rows(4, 6)
    assert_near(solve(few.sums(), "exact").matrix, few.delta.T @ torch.linalg.pinv(few.activation.T))
    many = rows(40, 6)
    root = many.weights.sqrt()[:, None]
    least_squares = torch.linalg.lstsq(root * many.activation, root * many.delta).solution.T
    assert_near(solve(many.sums(), "exact").matrix, least_squares)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_ridge_is_regularised_least_squares(normalization: str) -> None:
    r = rows(5, 8, normalization=normalization)
    root = r.scaled_weights.sqrt()[:, None]
    shift = 0.03 * float((root * r.activation).square().sum()) / 8
    left = torch.cat([root * r.activation, math.sqrt(shift) * torch.eye(8, dtype=torch.float64)])
    right = torch.cat([root * r.delta, torch.zeros(8, 8, dtype=torch.float64)])
    expected = torch.linalg.lstsq(left, right).solution.T
    assert_near(solve(r.sums(), "ridge", ridge=0.03, normalization=normalization).matrix, expected)


@pytest.mark.parametrize("estimator", ["ridge", "affine"])
def test_a_ridge_may_be_diagonal(estimator: str) -> None:
    """Least squares with ε_j tr(Z)/d on the square of Δ's column j, on (centred) rows."""
    r, ridge = rows(5, 8, offset=0.3), torch.linspace(0.01, 2, 8, dtype=torch.float64)
    root = r.weights.sqrt()[:, None]
    means = [r.weights @ x / r.weights.sum() if estimator == "affine" else 0 for x in (r.activation, r.delta)]
    inputs, targets = (root * (x - mean) for x, mean in zip((r.activation, r.delta), means, strict=True))
    penalty = (ridge * inputs.square().sum() / 8).sqrt().diag()
    expected = torch.linalg.lstsq(
        torch.cat([inputs, penalty]), torch.cat([targets, torch.zeros(8, 8, dtype=torch.float64)])
    ).solution.T
    assert_near(solve(r.sums(), estimator, ridge=ridge).matrix, expected)
    assert_near(
        solve(r.sums(), estimator, ridge=torch.full((8,), 0.3)).matrix,
        solve(r.sums(), estimator, ridge=0.3).matrix,
        1e-7,
    )
    for wrong in (ridge[:7], ridge[None], -ridge, ridge * math.inf, torch.ones(8, dtype=torch.int64)):
        with pytest.raises(ValueError, match="^solve: ridge must"):
            solve(r.sums(), estimator, ridge=wrong)


@pytest.mark.parametrize("n", [3, 30])
def test_affine_is_regularised_least_squares_with_an_intercept(n: int) -> None:
    r = rows(n, 6, offset=2.0)
    w = r.weights / r.weights.sum()
    centred = r.activation - w @ r.activation
    shift = 0.05 * float((r.weights * centred.square().sum(-1)).sum()) / 6
    root = r.weights.sqrt()[:, None]
    penalty = torch.cat([math.sqrt(shift) * torch.eye(6, dtype=torch.float64), torch.zeros(6, 1)], dim=1)
    left = torch.cat([torch.cat([root * r.activation, root], dim=1), penalty])
    right = torch.cat([root * r.delta, torch.zeros(6, 6, dtype=torch.float64)])
    expected = torch.linalg.lstsq(left, right).solution.T
    entry = solve(r.sums(), "affine", ridge=0.05)
    assert_near(entry.matrix, expected[:, :6])
    assert_near(entry.vector, expected[:, 6])
    assert_near(entry.activation_mean, w @ r.activation)


def test_second_order_is_the_double_sum_of_equation_24() -> None:
    r = rows(7, 4)
    y, delta, scale = r.activation, r.delta, 0.02
    single, double = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    for i in range(7):
        single += torch.outer(delta[i], y[i])
        for j in range(7):
            double += y[i].dot(y[j]) * torch.outer(delta[i], y[j])
    unweighted = Rows(delta, y, torch.ones(7, dtype=torch.float64))
    entry = solve(unweighted.sums(), "second_order", scale=scale)
    assert_near(entry.matrix, scale * single - scale**2 * double)


def test_mean_is_the_sum_as_accumulated_and_needs_no_division() -> None:
    r = rows(7, 4, normalization="norm")
    expected = sum(w * torch.outer(d, a) / a.norm() for w, d, a in zip(r.weights, r.delta, r.activation, strict=True))
    assert_near(solve(r.sums(), "mean", scale=0.5, normalization="norm").matrix, 0.5 * expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_residual_site_gets_the_mean_vector(estimator: str) -> None:
    r = rows(7, 4)
    sums = r.sums()._replace(cross=None, gram=None, activation_sum=None)
    entry = solve(sums, estimator, scale=0.7)
    expected = 0.7 * (r.weights @ r.delta)
    if estimator != "mean":
        expected = expected / r.weights.sum()
    assert_near(entry.vector, expected)
    assert entry.matrix is None
    no_matrix = torch.zeros(4, 4, dtype=torch.float64)
    assert entry.fit.residual == pytest.approx(r.residual(no_matrix, entry.vector), rel=EXACT)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(2, 12), st.integers(1, 6), st.sampled_from(ESTIMATORS), st.sampled_from(NORMALIZATIONS),
    st.floats(-2, 2), st.integers(0, 1000),
)  # fmt: skip
def test_the_residual_needs_no_rows(
    n: int, d: int, estimator: str, normalization: str, scale: float, seed: int
) -> None:
    normalization = "none" if estimator == "affine" else normalization
    r = rows(n, d, seed, normalization, offset=0.3)
    entry = solve(r.sums(), estimator, scale=scale, ridge=0.1, normalization=normalization)
    expected = r.residual(entry.matrix, entry.vector)
    # A difference of terms of size 1 + ‖Δ‖² ...: rounding is relative to the largest of them.
    size = 1 + float(entry.matrix.norm()) ** 2 * float(r.activation.square().sum()) / float(r.delta.square().sum())
    assert abs(entry.fit.residual - expected) <= EXACT * size
    assert entry.fit.rows == n


def test_residuals_order_the_estimators() -> None:
    r = rows(30, 5, offset=1.0)
    residual = {name: solve(r.sums(), name, ridge=0.2).fit.residual for name in ("exact", "ridge", "affine")}
    tighter = solve(r.sums(), "ridge", ridge=0.01).fit.residual
    assert 0 < residual["exact"] < tighter < residual["ridge"] < 1
    assert solve(r.sums(), "affine", ridge=1e-6).fit.residual < residual["exact"]


@pytest.mark.parametrize("estimator", ["ridge", "affine"])
def test_float32_sums_lose_no_more_than_plain_float32_algebra(estimator: str) -> None:
    r = rows(60, 16)
    truth = solve(r.sums(), estimator, ridge=0.01)
    entry = solve(r.sums(torch.float32), estimator, ridge=0.01)
    assert entry.matrix.dtype == torch.float32
    sums = r.sums(torch.float32)
    cross, gram, total = sums.cross, sums.gram, sums.moments[0].float()
    if estimator == "affine":
        cross = cross - torch.outer(sums.delta_sum, sums.activation_sum) / total
        gram = gram - torch.outer(sums.activation_sum, sums.activation_sum) / total
    shifted = gram + 0.01 * gram.trace() / 16 * torch.eye(16)
    plain = torch.linalg.solve(shifted, cross.T).T
    assert largest(entry.matrix.double() - truth.matrix) <= allowed_error(truth.matrix, plain)


def test_an_instruction_without_effect_gives_zero() -> None:
    r = rows(6, 4)
    r.delta = torch.zeros_like(r.delta)
    for estimator in ESTIMATORS:
        entry = solve(r.sums(), estimator)
        assert not entry.matrix.any()
        assert entry.vector is None or not entry.vector.any()
        assert entry.fit.residual == 0


def test_zero_activations_give_a_zero_matrix() -> None:
    r = rows(6, 4)
    r.activation = torch.zeros_like(r.activation)
    for estimator in ESTIMATORS:
        entry = solve(r.sums(), estimator)
        assert not entry.matrix.any(), estimator
        assert math.isinf(entry.fit.condition)
        assert entry.fit.fold_residual is None
    assert_near(solve(r.sums(), "affine").vector, r.weights @ r.delta / r.weights.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_affine_with_one_activation_leaves_everything_to_the_vector(dtype: torch.dtype) -> None:
    r = rows(6, 4)
    r.activation = r.activation[:1].repeat(6, 1)
    entry = solve(r.sums(dtype), "affine", ridge=0.1)
    assert not entry.matrix.any()
    assert_near(entry.vector.double(), r.weights @ r.delta / r.weights.sum(), 1e-6 if dtype == torch.float32 else EXACT)


def test_spherical_rows_are_told_and_their_scale_makes_mean_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    delta, weights = torch.randn(8, 8, generator=generator, dtype=torch.float64), torch.full((8,), 0.5).double()
    spherical = Rows(delta, 3 * basis, weights).sums()  # Z = 4.5 1
    fit = solve(spherical, "mean").fit
    assert fit.anisotropy <= 1e-7 and fit.spherical_scale == pytest.approx(1 / 4.5)
    assert_near(solve(spherical, "mean", scale=fit.spherical_scale).matrix, solve(spherical, "exact").matrix)
    other = rows(5, 8)
    gram = other.sums().gram
    fit, mean = solve(other.sums(), "mean").fit, gram.trace() / 8
    wanted = (gram - mean * torch.eye(8, dtype=torch.float64)).norm() / gram.norm()
    assert fit.anisotropy == pytest.approx(float(wanted)) and fit.spherical_scale == pytest.approx(float(1 / mean))
    nothing = solve(Rows(delta, 0 * basis, weights).sums(), "mean").fit
    assert nothing.anisotropy is None and nothing.spherical_scale is None


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_scale_leaves_less_than_the_best_one(estimator: str, normalization: str) -> None:
    if estimator == "affine" and normalization != "none":
        pytest.skip("affine needs ν = 1")
    r = rows(20, 4, offset=1.5, normalization=normalization)

    def left(scale: float) -> float:
        entry = solve(r.sums(), estimator, scale=scale, normalization=normalization)
        return r.residual(entry.matrix, entry.vector)

    best = solve(r.sums(), estimator, scale=3.0, normalization=normalization).fit.best_scale
    least = left(best)
    assert least < 1 and least <= min(left((1 + step) * best) for step in (-0.01, 0.01, -0.5, 1.0))
    assert all(left(share * best) < 1 for share in (1e-3, 0.1, 0.9))
    assert solve(r.sums(), estimator, scale=0.0).fit.best_scale in (None, pytest.approx(best))


def test_the_best_scales_of_spherical_rows_and_of_the_residual_site() -> None:
    sums = Rows(rows(8, 8).delta, 3 * torch.eye(8).double(), torch.full((8,), 0.5).double()).sums()  # Z = 4.5 1
    assert solve(sums, "mean", scale=7.0).fit.best_scale == pytest.approx(1 / 4.5)
    assert solve(sums, "second_order", scale=7.0).fit.best_scale == pytest.approx(0.5 / 4.5)
    vectors = Sums(None, None, sums.delta_sum, None, sums.moments)
    assert solve(vectors, "mean", scale=7.0).fit.best_scale == pytest.approx(1 / 4)
    assert solve(vectors, "ridge", scale=7.0).fit.best_scale == pytest.approx(1)


def test_fold_residual_is_the_error_of_the_folded_vector() -> None:
    r = rows(20, 4, offset=1.5)
    entry = solve(r.sums(), "affine")
    mean = entry.activation_mean
    folded = torch.outer(entry.vector, mean) / mean.square().sum()
    error = ((r.activation @ folded.T - entry.vector).square().sum(-1) * r.weights).sum()
    expected = error / (r.weights.sum() * entry.vector.square().sum())
    assert entry.fit.fold_residual == pytest.approx(float(expected), rel=EXACT)
    assert solve(r.sums(), "ridge", normalization="norm").fit.fold_residual is None


def test_condition_number_of_a_known_spectrum() -> None:
    basis = torch.linalg.qr(rows(5, 5).delta).Q
    spectrum = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    assert condition_number(basis * spectrum @ basis.T, rtol=1e-12) == pytest.approx(30)
    spectrum[-1] = 0
    assert condition_number(basis * spectrum @ basis.T, rtol=1e-12) == math.inf
    assert solve(rows(3, 8).sums(), "ridge").fit.condition == math.inf


@pytest.mark.parametrize(
    ("estimator", "options", "message"),
    [
        ("median", {}, "estimator must be one of mean, exact"),
        ("ridge", {"ridge": 0.0}, "ridge must be finite and positive, got 0.0"),
        ("affine", {"ridge": -1.0}, "ridge must be finite and positive"),
        ("ridge", {"ridge": math.nan}, "ridge must be finite and positive"),
        ("mean", {"scale": math.inf}, "scale must be finite, got inf"),
        ("affine", {"normalization": "norm"}, "normalization must be 'none' for estimator 'affine', got 'norm'"),
    ],
)
def test_bad_options_are_refused(estimator: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(rows(4, 3).sums(), estimator, **options)


def test_no_rows_and_overflowed_sums_are_refused() -> None:
    r = rows(4, 3)
    r.weights = torch.zeros_like(r.weights)
    with pytest.raises(ValueError, match="at least one row of positive weight"):
        solve(r.sums(), "ridge")
    sums = rows(4, 3).sums()
    sums.gram[0, 0] = math.inf
    with pytest.raises(ValueError, match="gram must be finite"):
        solve(sums, "exact")


def test_a_ridge_below_the_rounding_of_the_sums_is_refused() -> None:
    sums = rows(2, 16).sums()
    sums.gram.sub_(1e-6 * torch.eye(16))  # what rounding does to a singular matrix, in the bad direction
    with pytest.raises(ValueError, match="ridge must make Z positive definite, got 1e-09"):
        solve(sums, "ridge", ridge=1e-9)


def test_there_is_one_default_ridge() -> None:
    for function in (solve, ThoughtAccumulator.solve, transmute):
        assert inspect.signature(function).parameters["ridge"].default == DEFAULT_RIDGE
