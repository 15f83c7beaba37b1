"""From streamed sums to a thought matrix and vector: pure functions, float64 linear algebra.

All of them look for Δ with Δ a ≈ δ over weighted rows, of which only C = Σ w δ aᵀ/ν, Z = Σ w a aᵀ/ν and the first
moments are known.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thought_kernels.estimation.kept_rows import KeptRows, factorised, positive_factor, solve_rows, sphericity
from thought_kernels.estimation.scales import linear_scale, second_order_scale
from thought_kernels.estimation.sums import Sums
from thought_kernels.ops.checks import check_choice, check_number
from thought_kernels.patches.site import Fit, SitePatch, is_finite

_POWER_STEPS = 8
DEFAULT_RIDGE = 1.0
ESTIMATORS = ("mean", "exact", "ridge", "second_order", "affine")


def solve(
    sums: Sums | KeptRows,
    estimator: str,
    *,
    scale: float = 1.0,
    ridge: float | Tensor = DEFAULT_RIDGE,
    normalization: str = "none",
) -> SitePatch:
    """Estimates the patch of one site, Δ (and v) with Δ a + v ≈ δ over the accumulated rows.

    Formula, with λ = scale and Ω = Σ w::

        mean          Δ = λ C                                      residual site: v = λ b
        exact         Δ = λ C Z⁻¹, minimum-norm C Z⁺ if Z is singular             v = λ b / Ω
        ridge         Δ = λ C (Z + ε tr(Z)/d 1)⁻¹                                 v = λ b / Ω
        second_order  Δ = λ C − λ² C Z                                            v = λ b / Ω
        affine        Δ = λ ridge on centred C, Z; v = λ (b − Δ/λ ā) / Ω          v = λ b / Ω

    Here d is the activation's width d_in. Of the sites with a matrix only ``affine`` yields a vector; the residual site
    has no matrix. Rows whose activations are all zero leave Z = 0, hence C = 0, and the matrix is then zero. Rows that
    are fewer than d_in are solved as they are (kept_rows.py), with the same result to rounding.

    Args:
        sums: float32 or float64 sums of one site, or its rows; sums without ``gram`` are those of the residual site.
        estimator: one of ``ESTIMATORS``.
        scale: λ, finite. ``exact``, ``ridge`` and ``affine`` are made for 1. ``mean`` and ``second_order`` need it
            tuned: see the fit's residual, above 1 where the patch is worse than none, and its best_scale.
            ``second_order`` sums two terms of a series that converges only for λ below 1 over Z's largest eigenvalue.
        ridge: ε > 0, in units of Z's mean eigenvalue, one number or one for each input, ``[d_in]``, diag(ε) then taking
            the place of ε 1; read by ``ridge`` and ``affine`` only.
        normalization: the ν of the sums, ``"none"``, ``"norm"`` or ``"squared_norm"``.

    Returns:
        A SitePatch in the sums' dtype and on their device, with its Fit.

    Raises:
        ValueError: unknown estimator, bad scale or ridge, no rows, non-finite sums, ``affine`` with ν ≠ 1, or a ridge
            too small for the sums' rounding.
        TypeError: a scale or ridge that is not a number.

    Source: "Transmuting prompts into weights", Theorem 3.1 (eq. 8), eq. 10, A.2 (eq. 20-24), Algorithm 1; ``affine``
        is ours.
    """
    check_number("solve", "scale", scale)
    check_options("solve", estimator, ridge, normalization)
    if isinstance(ridge, Tensor):
        if len(ridge) != sums.widths[1]:
            raise ValueError(f"solve: ridge must have one number for each of {sums.widths[1]} inputs, got {len(ridge)}")
        ridge = ridge.to(sums.device, torch.float64)
    if isinstance(sums, KeptRows):
        _check_weight(float(sums.joined()[2].sum()))
        return solve_rows(sums, estimator, scale=scale, ridge=ridge, normalization=normalization)
    _check_weight(float(sums.moments[0]))
    for name, tensor in sums.tensors().items():
        if not is_finite(tensor):
            raise ValueError(
                f"solve: {name} must be finite, got NaN or an infinity; the rows overflowed {tensor.dtype}"
            )
    if sums.gram is None or sums.cross is None or sums.activation_sum is None:
        return _solve_vector(sums, estimator, scale)
    return _solve_matrix(sums, estimator, scale, ridge, normalization)


def _solve_vector(sums: Sums, estimator: str, scale: float) -> SitePatch:
    """The residual site's patch."""
    total, _, energy, rows = sums.moments.tolist()
    delta_sum = sums.delta_sum.double()
    vector = scale * (delta_sum if estimator == "mean" else delta_sum / total)
    along, square = float(vector.dot(delta_sum)), float(total * vector.dot(vector))
    residual, best = _relative(energy + square - 2 * along, energy), linear_scale(scale, along, square)
    return SitePatch(vector=vector.to(sums.delta_sum.dtype), fit=Fit(int(rows), residual, best_scale=best))


def _solve_matrix(sums: Sums, estimator: str, scale: float, ridge: float | Tensor, normalization: str) -> SitePatch:
    """The patch of a site with a matrix."""
    assert sums.cross is not None and sums.gram is not None and sums.activation_sum is not None
    total, _, energy, rows = sums.moments.tolist()
    dtype = sums.delta_sum.dtype
    delta_sum, cross, activation_sum = sums.delta_sum.double(), sums.cross.double(), sums.activation_sum.double()
    gram = sums.gram if estimator == "ridge" else sums.gram.double()  # widened once, where it is factorised
    rtol = gram.shape[0] * torch.finfo(dtype).eps
    target, metric = cross, gram
    if estimator == "affine":
        target, metric = _centred(cross, gram, delta_sum, activation_sum, total, rtol)
    if estimator in ("ridge", "affine"):
        matrix = scale * ridge_solve(target, metric, ridge)
        predicted = torch.addcmul(scale * target, matrix, _shift(metric, ridge), value=-1)  # for Δ (Z + s) = λ C
        if estimator == "affine":
            predicted += torch.outer(matrix @ activation_sum, activation_sum) / total
    else:
        matrix = _without_ridge(estimator, cross, gram, scale, rtol)
        predicted = matrix @ gram
    singular = rows < gram.shape[0] + (estimator == "affine")
    vector = None
    along, square = _inner(matrix, cross), _inner(matrix, predicted)
    if estimator == "affine":
        vector = (scale * delta_sum - matrix @ activation_sum) / total
        along += float(vector.dot(delta_sum))
        square += float(vector.dot(2 * (matrix @ activation_sum) + total * vector))
    best = _second_order_scale(cross, gram) if estimator == "second_order" else linear_scale(scale, along, square)
    fit = Fit(
        int(rows),
        _relative(energy + square - 2 * along, energy),
        math.inf if singular else condition_number(metric, rtol=rtol),
        _fold_residual(gram, activation_sum, total) if normalization == "none" else None,
        *sphericity(gram, gram.shape[0]),
        best,
    )
    mean = (activation_sum / total).to(dtype)
    return SitePatch(matrix.to(dtype), None, vector if vector is None else vector.to(dtype), mean, fit)


def _without_ridge(estimator: str, cross: Tensor, gram: Tensor, scale: float, rtol: float) -> Tensor:
    """Δ of ``mean``, ``second_order`` and ``exact``."""
    if estimator == "mean":
        return scale * cross
    return second_order(cross, gram, scale) if estimator == "second_order" else scale * exact(cross, gram, rtol=rtol)


def _centred(
    cross: Tensor, gram: Tensor, delta_sum: Tensor, activation_sum: Tensor, total: float, rtol: float
) -> tuple[Tensor, Tensor]:
    """C and Z of rows less their means."""
    target = cross - torch.outer(delta_sum, activation_sum) / total
    metric = gram - torch.outer(activation_sum, activation_sum) / total
    if float(metric.trace()) <= rtol * float(gram.trace()):
        # Equal activations leave only the sums' rounding once centred: the vector alone fits them.
        return torch.zeros_like(cross), torch.zeros_like(gram)
    return target, metric


def check_options(function: str, estimator: str, ridge: float | Tensor, normalization: str) -> None:
    """Raises ValueError or TypeError, in a function's name, if ``solve`` would refuse these, whatever the sums."""
    check_choice(function, "estimator", estimator, ESTIMATORS)
    if isinstance(ridge, Tensor):
        if ridge.ndim != 1 or not ridge.is_floating_point() or not bool((ridge > 0).all()) or not is_finite(ridge):
            raise ValueError(f"{function}: ridge must be a number or a row of finite positive ones, got {ridge}")
    elif estimator in ("ridge", "affine"):
        check_number(function, "ridge", ridge, positive=True)
    if estimator == "affine" and normalization != "none":
        raise ValueError(
            f"{function}: normalization must be 'none' for estimator 'affine', got {normalization!r}; "
            "its first moments are not divided by ν, so they do not centre C and Z"
        )


def exact(cross: Tensor, gram: Tensor, *, rtol: float) -> Tensor:
    """C Z⁺, the least-squares Δ of smallest Frobenius norm; eigenvalues up to rtol times the largest count as zero.

    Source: "Transmuting prompts into weights", eq. 8 and eq. 21.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    kept = eigenvalues > rtol * eigenvalues[-1].clamp(min=0)
    basis = eigenvectors[:, kept]
    return (cross @ basis / eigenvalues[kept]) @ basis.T


def ridge_solve(cross: Tensor, gram: Tensor, epsilon: float | Tensor) -> Tensor:
    """C (Z + tr(Z)/d diag(ε))⁻¹ by Cholesky factorisation; zero where Z is zero.

    Raises:
        ValueError: Z + tr(Z)/d diag(ε) is not positive definite to rounding.

    Source: "Transmuting prompts into weights", A.2, whose ε is diagonal.
    """
    if float(gram.trace()) == 0:
        return torch.zeros_like(cross)
    factor = positive_factor(gram, _shift(gram, epsilon), epsilon)
    whitened = torch.linalg.solve_triangular(factor.T, cross.double(), upper=True, left=False)
    return torch.linalg.solve_triangular(factor, whitened, upper=False, left=False).contiguous()


def _shift(gram: Tensor, epsilon: float | Tensor) -> Tensor:
    """s = ε tr(Z)/d, float64, one number or one for each input."""
    return epsilon * (gram.diagonal().sum(dtype=torch.float64) / len(gram))


def second_order(cross: Tensor, gram: Tensor, scale: float) -> Tensor:
    """λ C − λ² C Z, two terms of the expansion of C (Z + 1/λ)⁻¹ in λ.

    Source: "Transmuting prompts into weights", eq. 24 (eq. 22 expanded; eq. 23's ``c − cZ²`` is a misprint).
    """
    return scale * cross - scale**2 * (cross @ gram)


def _second_order_scale(cross: Tensor, gram: Tensor) -> float | None:
    moved = cross @ gram
    return second_order_scale(
        (_inner(cross, cross), _inner(cross, moved), _inner(moved, moved), _inner(moved, moved @ gram))
    )


def condition_number(gram: Tensor, *, rtol: float) -> float:
    """λ_max / λ_min of a symmetric matrix, inf where λ_min does not exceed rtol · λ_max.

    Eigenvalues cost ten times what a Cholesky factorisation does. With μ <= λ_max most singular matrices are told
    without: λ_min is at most the smallest diagonal element, and gram − rtol μ 1 has no factor only where
    λ_min <= rtol λ_max.
    """
    x = gram.diagonal()
    for _ in range(_POWER_STEPS):  # ‖Z x‖ <= λ_max for every unit x
        x = gram @ (x / torch.linalg.vector_norm(x).clamp_min(torch.finfo(x.dtype).tiny))
    least = rtol * float(torch.linalg.vector_norm(x))
    if float(gram.diagonal().min()) <= least:
        return math.inf
    lowered = gram.to(torch.float64, copy=True)
    lowered.diagonal().sub_(least)
    if not factorised(lowered):
        return math.inf
    eigenvalues = torch.linalg.eigvalsh(gram.double())
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    return largest / smallest if smallest > rtol * largest else math.inf


def _check_weight(total: float) -> None:
    if total <= 0:
        raise ValueError(f"solve: sums must hold at least one row of positive weight, got Σw = {total:g}")


def _inner(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())


def _relative(error: float, energy: float) -> float:
    # A difference of sums of size `energy`: an exact fit leaves rounding of either sign. δ = 0 is fitted by Δ = 0.
    return max(error, 0.0) / energy if energy > 0 else 0.0


def _fold_residual(gram: Tensor, activation_sum: Tensor, total: float) -> float | None:
    """Σ w ‖v āᵀa/‖ā‖² − v‖² / (Ω ‖v‖²) with ā the mean: the same for every v."""
    norm = float(activation_sum.dot(activation_sum))
    if norm == 0:
        return None
    along = activation_sum.dot((gram @ activation_sum.to(gram.dtype)).double())
    return max(0.0, total * float(along) / norm**2 - 1)
