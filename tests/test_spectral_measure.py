"""Frame operator, spectral measure and what follows from it, on random, rank-deficient and badly scaled matrices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from figures import orthogonal
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FLOORS, largest
from torch import Tensor

import thought_kernels as tk
from thought_kernels import spectral

SHAPES = [(6, 20), (20, 6), (16, 16), (1, 5), (5, 1), (1, 1), (3, 700)]


def random_matrix(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * m + 10 * n + seed)
    return torch.randn(m, n, generator=generator, dtype=torch.float64).to(dtype)


def pairwise_dimensionality(W: Tensor) -> Tensor:
    """The definition, in float64, with 0 for zero features."""
    products = W.double().T @ W.double()
    return torch.nan_to_num(products.diagonal().square() / products.square().sum(1))


def trained_like(m: int, n: int) -> Tensor:
    """A spectrum over five decades, as trained layers have, one zero feature and one small one."""
    generator = torch.Generator().manual_seed(m + n)
    values = torch.logspace(0, -5, min(m, n), dtype=torch.float64)
    left, right = orthogonal(m, generator)[:, : len(values)], orthogonal(n, generator)[:, : len(values)]
    W = (left * values) @ right.T
    W[:, 1] = 0
    W[:, 2] *= 1e-2
    return W


MATRICES = {f"random {m} x {n}": random_matrix(m, n) for m, n in SHAPES} | {
    "trained-like wide": trained_like(12, 40),
    "trained-like tall": trained_like(40, 12),
    "rank 3": random_matrix(10, 3) @ random_matrix(3, 25),
    "one nonzero": torch.eye(3, dtype=torch.float64)[:, :1] * torch.tensor([[0.0, 2.0, 0.0, 0.0]], dtype=torch.float64),
}
everything = pytest.mark.parametrize("name", list(MATRICES))


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_frame_operator_gram_and_dimensionality(m: int, n: int, dtype: torch.dtype) -> None:
    W = random_matrix(m, n, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for actual, truth in (
        (spectral.frame_operator(W), W.double() @ W.double().T),
        (spectral.gram(W), W.double().T @ W.double()),
        (spectral.fractional_dimensionality(W), pairwise_dimensionality(W)),
    ):
        assert actual.dtype == wide
        # Sums of up to 700 products of random sign, and a quotient of two such sums.
        assert largest(actual.double() - truth) <= 8 * FLOORS[wide] * largest(truth)
    F = spectral.frame_operator(W)
    assert torch.equal(F, F.T)
    assert spectral.frame_operator(W, dtype=torch.float64).dtype == torch.float64
    assert spectral.fractional_dimensionality(W, dtype=torch.float64).dtype == torch.float64


def test_the_sum_is_accumulates(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Tensor, **options: object) -> None:
        calls.append(args[2].shape)
        tk.accumulate(*args, **options)

    monkeypatch.setattr("thought_kernels.spectral.frames.accumulate", counted)
    spectral.frame_operator(random_matrix(3, 7))
    assert calls == [(7, 3)]


def test_dimensionality_of_many_features_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thought_kernels.spectral.frames._BLOCK_ELEMENTS", 64 * 5)
    W = random_matrix(5, 333)
    W[:, 100] = 0
    torch.testing.assert_close(spectral.fractional_dimensionality(W), pairwise_dimensionality(W), rtol=1e-12, atol=0)
    leverage = (torch.linalg.pinv(W) * W.T).sum(1)
    torch.testing.assert_close(spectral.leverage(W), leverage, rtol=1e-11, atol=1e-15)
    expected = torch.nan_to_num(1 - pairwise_dimensionality(W) / leverage)
    torch.testing.assert_close(spectral.slack(W), expected, rtol=1e-9, atol=1e-12)


@everything
def test_leverage_sums_to_the_rank_and_bounds_dimensionality(name: str) -> None:
    W = MATRICES[name]
    rank = int(torch.linalg.matrix_rank(W))
    leverage, dimensionality = spectral.leverage(W), spectral.fractional_dimensionality(W)
    measures = spectral.measure_features(W)
    assert abs(float(leverage.sum()) - rank) <= 1e-9
    assert float((dimensionality - leverage).max()) <= 1e-9
    torch.testing.assert_close(measures.dimensionality, dimensionality, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(measures.leverage, leverage, rtol=1e-12, atol=1e-15)
    slack = spectral.slack(W)
    assert float(slack.min()) >= 0 and float(slack.max()) <= 1
    torch.testing.assert_close(leverage * (1 - slack), dimensionality, rtol=1e-9, atol=1e-12)
    assert spectral.saturation(W) == pytest.approx(float(dimensionality.sum()) / rank, rel=1e-9)
    assert spectral.saturation(W) <= 1 + 1e-12


@pytest.mark.parametrize("m, n", [(12, 60), (60, 12)])
def test_leverage_sums_to_the_rank_whatever_the_condition(m: int, n: int) -> None:
    size = min(m, n)
    mixed = random_matrix(size, size, seed=1) * torch.logspace(0, -10, size, dtype=torch.float64)
    W = mixed @ random_matrix(size, n) if m <= n else (mixed @ random_matrix(size, m)).T
    measures = spectral.measure_features(W)
    assert abs(float(spectral.leverage(W).sum()) - size) <= 1e-9
    assert float((measures.dimensionality - measures.leverage).max()) <= 1e-12
    classes = spectral.classify_features(W)
    assert abs(size - float(measures.dimensionality.sum()) - classes.defect) <= 1e-9  # Theorem 8


@everything
def test_the_measure_is_a_probability_with_the_moments_of_the_frame_operator(name: str) -> None:
    W = MATRICES[name]
    eigenvalues, weights, multiplicities = spectral.spectral_measure(W, rtol=1e-12)
    F = W @ W.T
    squared_norm = W.square().sum(0)
    nonzero = squared_norm > 0
    assert int(multiplicities.sum()) == int(torch.linalg.matrix_rank(W))
    assert bool((eigenvalues > 0).all()) and bool((eigenvalues.diff() < 0).all())
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(1), nonzero.double(), rtol=0, atol=1e-12)
    for order in (1, 2, 3):
        expected = torch.nan_to_num((W * (torch.linalg.matrix_power(F, order) @ W)).sum(0) / squared_norm)
        scale = float(expected.max())
        assert largest(weights @ eigenvalues**order - expected) <= 1e-9 * scale
        assert largest(spectral.spectral_moment(W, order) - expected) <= 1e-9 * scale
    inverse = spectral.spectral_moment(W, -1)
    torch.testing.assert_close(inverse * squared_norm, spectral.leverage(W), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(spectral.rayleigh_quotient(W), spectral.spectral_moment(W, 1), rtol=1e-12, atol=0)


@everything
def test_the_residual_is_the_measures_coefficient_of_variation(name: str) -> None:
    W = MATRICES[name]
    eigenvalues, weights, _ = spectral.spectral_measure(W, rtol=0.0)
    mean = weights @ eigenvalues
    deviation = (weights * (eigenvalues - mean[:, None]).square()).sum(1).sqrt()
    variation = torch.nan_to_num(deviation / mean)
    assert largest(spectral.eigenvector_residual(W) - variation) <= 1e-9
    assert largest(spectral.measure_features(W).residual - variation) <= 1e-9


def test_a_small_residual_alone_bounds_no_slack() -> None:
    """A thousandth of the norm at a millionth of the eigenvalue: half of the capacity is slack."""
    W = torch.tensor([[1.0, 1.0], [1e-3, -1e-3]], dtype=torch.float64)
    assert float(spectral.eigenvector_residual(W).max()) < 1.1e-3 and float(spectral.slack(W).min()) > 0.49
    narrow = torch.tensor([[1.0, 1.0], [0.95, -0.95]], dtype=torch.float64)  # where the support is narrow, CV² is it
    assert spectral.slack(narrow).tolist() == pytest.approx(
        spectral.eigenvector_residual(narrow).square().tolist(), rel=0.02
    )


@everything
def test_the_support_bounds_the_slack(name: str) -> None:
    W = MATRICES[name]
    lower, upper, half_width = spectral.support_bounds(W)
    assert float((spectral.slack(W) - half_width.square()).max()) <= 1e-11
    measures = spectral.measure_features(W)
    assert torch.equal(measures.half_width, half_width)
    inside = (lower <= measures.rayleigh * (1 + 1e-9)) & (measures.rayleigh <= upper * (1 + 1e-9))
    assert bool(inside.all())


@everything
def test_the_bridge_between_the_two_spectra(name: str) -> None:
    W = MATRICES[name]
    bridge = spectral.frame_spectrum(W, rtol=1e-9)
    roots = bridge.all_eigenvalues.sqrt()
    U, V = bridge.frame_basis, bridge.gram_basis
    scale = float(roots[0])
    assert largest(W @ V - U * roots) <= 1e-9 * scale
    assert largest(W.T @ U - V * roots) <= 1e-9 * scale
    identity = torch.eye(bridge.rank, dtype=torch.float64)
    assert largest(U.T @ U - identity) <= 1e-9 and largest(V.T @ V - identity) <= 1e-9
    sum_of_parts = torch.zeros(len(W), len(W), dtype=torch.float64)
    for index, value in enumerate(bridge.eigenvalues):
        P, E = bridge.frame_projector(index), bridge.gram_projector(index)
        assert largest(P @ W - W @ E) <= 1e-9 * scale
        assert abs(float(P.trace()) - int(bridge.multiplicities[index])) <= 1e-9
        sum_of_parts += value * P
    assert largest(sum_of_parts - W @ W.T) <= 1e-8 * scale**2  # eigenvalues are grouped to 1e-9


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([1e-200, 1e-12, 1.0, 3e7, 1e180]))
def test_nothing_changes_under_rotation_order_and_scale(m: int, n: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=generator, dtype=torch.float64)
    W[:, torch.rand(n, generator=generator) < 0.1] = 0
    if not W.any():
        W[0, 0] = 1
    order = torch.randperm(n, generator=generator)
    changed = (orthogonal(m, generator) @ W)[:, order] * scale
    for function in (
        spectral.fractional_dimensionality,
        spectral.leverage,
        spectral.slack,
        spectral.eigenvector_residual,
        lambda X: spectral.spectral_measure(X).weights,
        lambda X: spectral.support_bounds(X)[2],
    ):
        # A random matrix of this size is at worst conditioned like 1e4, and leverage then loses as much.
        torch.testing.assert_close(function(changed), function(W)[order], rtol=1e-6, atol=1e-8)
    assert spectral.saturation(changed) == pytest.approx(spectral.saturation(W), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_float32_of_any_scale(scale: float) -> None:
    W = random_matrix(4, 9, dtype=torch.float32)
    W[:, 3] *= 1e-6  # fourth powers underflow
    expected = pairwise_dimensionality(W)
    for X, truth in ((W, expected), (W.T.contiguous(), pairwise_dimensionality(W.T))):
        torch.testing.assert_close(spectral.fractional_dimensionality(X * scale).double(), truth, rtol=1e-4, atol=1e-6)
    assert spectral.saturation(W * scale) == pytest.approx(float(expected.sum()) / 4, rel=1e-6)


def test_tiny_features_beside_large_ones_keep_their_dimensionality() -> None:
    W = torch.eye(3) * torch.tensor([1.0, 1e-8, 1e-12])
    torch.testing.assert_close(spectral.fractional_dimensionality(W), torch.ones(3))
    W = torch.eye(3, dtype=torch.float64) * torch.tensor([1.0, 1e-60, 1e-100], dtype=torch.float64)
    torch.testing.assert_close(spectral.fractional_dimensionality(W), torch.ones(3, dtype=torch.float64))
    # By the rank tolerance the last two are rounding: they use up none of the rank, which is 1.
    assert spectral.saturation(W) == pytest.approx(1.0, abs=1e-12)
    assert spectral.leverage(W).tolist() == [1.0, 0.0, 0.0]
    assert spectral.saturation(W, rank_rtol=0.0) == pytest.approx(1.0, abs=1e-12)


def test_features_far_below_the_largest_eigenvalue_keep_their_digits() -> None:
    generator = torch.Generator().manual_seed(4)
    scales = torch.tensor([1e4, 1, 1, 1e-2, 1e-2, 1e-2], dtype=torch.float64)[:, None]
    W = torch.cat([torch.eye(6, dtype=torch.float64), torch.randn(6, 14, generator=generator).double()], 1) * scales
    W = orthogonal(6, generator) @ torch.cat([W, torch.block_diag(*[scales[i] for i in range(6)])], 1)
    expected = pairwise_dimensionality(W)
    torch.testing.assert_close(spectral.fractional_dimensionality(W), expected, rtol=1e-9, atol=0)
    assert spectral.saturation(W) == pytest.approx(float(expected.sum()) / 6, rel=1e-9)


def test_the_rank_tolerance() -> None:
    W = torch.eye(4, dtype=torch.float64) * torch.tensor([1.0, 1e-9, 1e-14, 1e-17], dtype=torch.float64)
    assert spectral.frame_spectrum(W).rank == 3 == int(torch.linalg.matrix_rank(W))
    assert spectral.frame_spectrum(W, rank_rtol=1e-8).rank == 1
    assert spectral.frame_spectrum(W.float()).rank == 1 == int(torch.linalg.matrix_rank(W.float()))
    assert float(spectral.leverage(W).sum()) == pytest.approx(3, abs=1e-9)


def test_eigenvalues_within_the_tolerance_are_one() -> None:
    values = torch.tensor([1.0, 1 - 4e-7, 1 - 8e-7, 0.5], dtype=torch.float64)
    W = values.sqrt().diag()
    assert spectral.spectral_measure(W).multiplicities.tolist() == [3, 1]
    assert spectral.spectral_measure(W, rtol=1e-7).multiplicities.tolist() == [1, 1, 1, 1]
    assert float(spectral.spectral_measure(W).eigenvalues[0]) == pytest.approx(1 - 4e-7, abs=1e-12)


@pytest.mark.parametrize("rtol", [1e-3, 0.02, 0.1])
def test_no_eigenspace_is_wider_than_the_tolerance(rtol: float) -> None:
    """Small gaps in a row do not chain: a continuous spectrum is not one eigenvalue."""
    steps = 1 + 0.3 * torch.rand(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = 1 - 0.01 * steps.cumsum(0)
    found = spectral.frame_spectrum(values.sqrt().diag(), rtol=rtol)
    widths = [
        float(found.all_eigenvalues[found.groups == e].max() - found.all_eigenvalues[found.groups == e].min())
        for e in range(len(found.eigenvalues))
    ]
    limit = rtol * float(found.all_eigenvalues[0])
    assert max(widths) <= limit
    # No two neighbours could be one: a group is cut at its largest gap only where it is too wide.
    exact = values.round(decimals=2)
    repeated = spectral.frame_spectrum(exact.sqrt().diag(), rtol=1e-6)
    assert repeated.multiplicities.tolist() == exact.unique(return_counts=True)[1].flip(0).tolist()


def test_zero_features_are_counted() -> None:
    W = torch.eye(3, 5, dtype=torch.float64)
    assert spectral.fractional_dimensionality(W).tolist() == [1, 1, 1, 0, 0]
    assert spectral.leverage(W).tolist() == [1, 1, 1, 0, 0]
    assert spectral.slack(W).tolist() == [0] * 5
    assert spectral.eigenvector_residual(W).tolist() == [0] * 5
    assert spectral.spectral_measure(W).weights.shape == (5, 1)
    assert spectral.saturation(W) == 1.0
    assert spectral.fractional_dimensionality(torch.zeros(2, 3)).tolist() == [0, 0, 0]
    assert spectral.fractional_dimensionality(torch.zeros(3, 2)).tolist() == [0, 0]
    assert spectral.leverage(torch.zeros(2, 3)).tolist() == [0, 0, 0]


OF_A_MATRIX: dict[str, Callable] = {
    name: getattr(spectral, name)
    for name in (
        "frame_operator",
        "gram",
        "fractional_dimensionality",
        "leverage",
        "slack",
        "saturation",
        "spectral_measure",
        "measure_features",
        "rayleigh_quotient",
        "eigenvector_residual",
        "support_bounds",
        "frame_spectrum",
        "tight_frames",
        "projective_linearity",
        "identify_geometry",
        "identify_components",
        "classify_features",
        "empirical_spectral_density",
        "inspect_matrix",
    )
}
OF_RANK_ZERO = {
    *("frame_operator", "gram", "fractional_dimensionality", "leverage", "frame_spectrum"),
    *("identify_geometry", "identify_components", "empirical_spectral_density"),
}


@pytest.mark.parametrize("name", list(OF_A_MATRIX))
def test_bad_matrices_raise(name: str) -> None:
    function = OF_A_MATRIX[name]
    good = random_matrix(3, 4)
    for bad, error, words in (
        (good.numpy(), TypeError, "dense tensor"),
        (good.tolist(), TypeError, "dense tensor"),
        (None, TypeError, "dense tensor"),
        (good.to_sparse(), TypeError, "dense tensor"),
        (good.to("meta"), ValueError, "have values"),
        (good.int(), TypeError, "float64, float32, bfloat16 or float16, got torch.int32"),
        (good[0], ValueError, "matrix"),
        (good[None], ValueError, "matrix"),
        (good[:, :0], ValueError, "at least one"),
        (good[:0], ValueError, "at least one"),
        (torch.where(good == good[1, 2], torch.nan, good), ValueError, "finite"),
        (torch.where(good == good[1, 2], -torch.inf, good), ValueError, "finite"),
    ):
        argument = "cluster" if name.startswith("identify_") else "W"
        with pytest.raises(error, match=f"^{name}: {argument} must .*{words}"):
            function(bad)
    zero = torch.zeros(3, 4)
    if name in OF_RANK_ZERO:
        function(zero)
    else:
        with pytest.raises(ValueError, match=f"^{name}: W must have rank at least 1, got rank 0; "):
            function(zero)


def test_bad_options_raise() -> None:
    W = random_matrix(3, 4)
    for call, words in (
        (lambda: spectral.spectral_measure(W, rtol=-1e-3), "spectral_measure: rtol must be finite and at least 0"),
        (lambda: spectral.spectral_measure(W, rtol=1.0), "spectral_measure: rtol must be less than 1, got 1.0"),
        (lambda: spectral.tight_frames(W, rtol=None), "tight_frames: rtol must be a number, got NoneType"),
        (lambda: spectral.saturation(W, rank_rtol=float("nan")), "saturation: rank_rtol must be finite"),
        (lambda: spectral.tight_frames(W, rtol="small"), "tight_frames: rtol must be a number, got str"),
        (lambda: spectral.tight_frames(W, localization=0.5), "tight_frames: localization must be less than 0.5"),
        (lambda: spectral.support_bounds(W, mass=0.5), "support_bounds: mass must be less than 0.5"),
        (lambda: spectral.spectral_moment(W, 1.5), "spectral_moment: order must be an integer, got float"),
        (lambda: spectral.frame_operator(W, dtype=torch.float16), "frame_operator: dtype must be torch.float32 or"),
        (lambda: spectral.classify_features(W, band=1.0), "classify_features: band must be less than 1"),
        (lambda: spectral.classify_features(W).residue(1.0), "residue: tau must be less than 1"),
        (lambda: spectral.identify_geometry(W, tol=0.1), "identify_geometry: tol must be less than 0.1"),
        (lambda: spectral.association_scheme(W), "association_scheme: M must be square, got [3, 4]"),
        (lambda: spectral.association_scheme(W[0]), "association_scheme: M must be a matrix"),
        (lambda: spectral.identify_geometry(W[0]), "identify_geometry: cluster must be a matrix"),
        (lambda: spectral.association_scheme(W[:, :3]), "association_scheme: M must "),
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            call()
        assert str(caught.value).startswith(words)


def test_weights_that_require_a_gradient_are_read_only() -> None:
    W = random_matrix(4, 6, dtype=torch.float32).requires_grad_()
    before = W.detach().clone()
    for function in OF_A_MATRIX.values():
        function(W)
    assert torch.equal(W.detach(), before)
    assert not spectral.fractional_dimensionality(W).requires_grad and not spectral.leverage(W).requires_grad


def test_transposed_and_strided_weights() -> None:
    W = random_matrix(6, 9)
    strided = torch.empty(18, 12, dtype=torch.float64)[::2, ::2].T
    strided.copy_(W)
    assert not strided.is_contiguous()
    torch.testing.assert_close(spectral.fractional_dimensionality(strided), pairwise_dimensionality(W))
    torch.testing.assert_close(spectral.leverage(strided), spectral.leverage(W), rtol=1e-10, atol=1e-13)
