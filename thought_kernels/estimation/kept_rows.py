"""Rows of one block and site, kept as they are while they are fewer than the activation is wide, and solved from there.

N rows of width d_in hold less than the d_in x d_in sums of them do, and their N x N products K = A Aᵀ say the same as
the sums' Z = Aᵀ A: Dᵀ (K + s 1)⁻¹ A = Dᵀ A (Z + s 1)⁻¹.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thought_kernels.estimation.scales import linear_scale, second_order_scale
from thought_kernels.patches.site import Fit, SitePatch, factors_are_smaller, is_finite

_PRODUCT_ROWS = 256  # below, the products of two blocks are too small to be fast
_FACTOR_COLUMNS = 128


@dataclass
class KeptRows:
    """Rows (δ, a, w) of nonzero weight, in the order in which they came.

    Attributes:
        widths: (d_out, d_in).
        dtype: of the kept δ and a; weights are kept in float64.
        device: of all of them.
    """

    widths: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    count: int = 0
    _parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def takes(self, rows: int) -> bool:
        """Whether there are fewer rows than the activation is wide with so many more, padding included."""
        return self.count + rows < self.widths[1]

    def add(self, delta: Tensor, activation: Tensor, weights: Tensor | None) -> None:
        """Appends copies of the rows δ [..., d_out], a [..., d_in] whose weight [...], or 1, is not 0."""
        w = delta.new_ones(delta.shape[:-1].numel()) if weights is None else weights.reshape(-1)
        kept = w.nonzero()[:, 0]
        delta, activation = (rows.reshape(-1, rows.shape[-1])[kept].to(self.dtype) for rows in (delta, activation))
        self._parts.append((delta, activation, w[kept].double()))
        self.count += len(kept)

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """δ [N, d_out], a [N, d_in] and w [N]."""
        if not self._parts:
            delta, activation = (torch.empty(0, width, dtype=self.dtype, device=self.device) for width in self.widths)
            return delta, activation, torch.empty(0, dtype=torch.float64, device=self.device)
        delta, activation, weights = (torch.cat(tensors) for tensors in zip(*self._parts, strict=True))
        self._parts = [(delta, activation, weights)]
        return delta, activation, weights


def solve_rows(rows: KeptRows, estimator: str, *, scale: float, ridge: float | Tensor, normalization: str) -> SitePatch:
    """The patch that ``estimators.solve`` finds from these rows' sums, from N x N products in their place.

    With A, D the rows a √(w/ν), δ √(w/ν) in float64, centred for ``affine``, K = A Aᵀ and s = ε tr(K)/d_in::

        mean          Δ = λ Dᵀ A                exact           Δ = λ Dᵀ K⁺ A
        second_order  Δ = λ Dᵀ (1 − λ K) A      ridge, affine   Δ = λ Dᵀ (K + s 1)⁻¹ A

    Factors are kept where they take less memory than Δ. Those of an inverse are Δ = (L⁻¹ D)ᵀ (L⁻¹ A), K + s 1 = L Lᵀ:
    singular values of the second are below 1, so that rounding it costs Δ no more than its own rounding does.

    Args:
        rows: fewer than the activation is wide, of positive total weight.
        estimator, scale, ridge, normalization: as ``estimators.solve`` has checked them.

    Raises:
        ValueError: rows that are not finite in their dtype, or K + s 1 not positive definite to rounding.
    """
    root, targets, inputs, mean, total = _weighted(rows, normalization)
    d_out, d_in = rows.widths
    energy = _squares(targets)
    fold_residual = _fold_residual(inputs, mean, total) if normalization == "none" else None
    rtol, offset, delta_mean = d_in * torch.finfo(rows.dtype).eps, None, None
    products = _products(inputs)
    spherical = sphericity(products, d_in)
    if estimator == "affine":
        norm, delta_mean = float(products.trace()), root @ targets / total
        offset = torch.outer(root, delta_mean)
        targets, inputs = targets - offset, inputs - torch.outer(root, mean)
        products = _products(inputs)
        if float(products.trace()) <= rtol * norm:
            products.zero_()  # equal activations, once centred, are rounding: the vector fits them
    left, right, missed = _solved(estimator, targets, inputs, products, scale, (ridge, rtol))
    best = _second_order_scale(products, targets) if estimator == "second_order" else None
    left = scale * left
    vector = None
    if delta_mean is not None and offset is not None:
        moved = left @ (mean if right is None else right.T @ mean)
        vector = (scale * delta_mean - moved).to(rows.dtype)
        targets = targets + offset  # not in place: what was missed may be the same tensor
    if estimator != "second_order":
        predicted = targets - missed  # at λ = 1
        best = linear_scale(1.0, _inner(targets, predicted), _squares(predicted))
    # δ − λ (δ − what was missed)
    error = _squares(missed if scale == 1 else torch.lerp(targets, missed, scale))
    factors = None
    if right is not None and factors_are_smaller(left.shape[1], d_out, d_in):
        factors = (left.to(rows.dtype), right.to(rows.dtype))
    return SitePatch(
        matrix=None if factors else (left if right is None else left @ right.T).to(rows.dtype),
        factors=factors,
        vector=vector,
        activation_mean=mean.to(rows.dtype),
        # Z has no more rank than there are rows.
        fit=Fit(rows.count, error / energy if energy > 0 else 0.0, math.inf, fold_residual, *spherical, best),
    )


def _weighted(rows: KeptRows, normalization: str) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """√(w/ν) [N], the rows δ and a times it, their mean activation [d_in], all in float64, and the rows' weight.

    Raises:
        ValueError: rows that are not finite in their dtype.
    """
    delta, activation, w = rows.joined()
    for name, tensor in (("delta", delta), ("activation", activation)):
        if not is_finite(tensor):
            raise ValueError(f"solve: {name} must be finite, got NaN or an infinity; the rows overflowed {rows.dtype}")
    root = _roots(activation, w, normalization)
    inputs, total = activation * root[:, None], float(w.sum())
    mean = torch.where(root == 0, 0, w / root) @ inputs / total
    return root, delta * root[:, None], inputs, mean, total


def _solved(
    estimator: str,
    targets: Tensor,
    inputs: Tensor,
    products: Tensor,
    scale: float,
    options: tuple[float | Tensor, float],
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(U [d_out, k], V [d_in, k], targets missed at λ = 1 [N, d_out]) with Δ = λ U Vᵀ; options are ε and the cutoff.

    Where V is None, U is Δ/λ itself.
    """
    epsilon, rtol = options
    if estimator in ("mean", "second_order"):
        left = targets if estimator == "mean" else targets - scale * (products @ targets)
        return left.T, inputs.T, targets - products @ left
    if estimator == "exact":
        eigenvalues, eigenvectors = torch.linalg.eigh(products)
        large = eigenvalues > rtol * eigenvalues[-1].clamp(min=0)
        basis = eigenvectors[:, large]
        whitened = basis / eigenvalues[large].sqrt()
        return targets.T @ whitened, inputs.T @ whitened, targets - basis @ (basis.T @ targets)
    if not products.any():
        return targets.T[:, :0], inputs.T[:, :0], targets
    shift = float(products.trace()) / inputs.shape[1]
    if isinstance(epsilon, Tensor):  # A diag(ε)^(-1/2) in A's place has 1 for ε, and gives Δ diag(ε)^(1/2)
        root = epsilon.sqrt()
        inputs = inputs / root
        left, right, missed = _ridged(targets, inputs, inputs @ inputs.T, shift, float(epsilon.min()))
        return (left / root, None, missed) if right is None else (left, right / root[:, None], missed)
    return _ridged(targets, inputs, products, shift * epsilon, epsilon)


def _ridged(
    targets: Tensor, inputs: Tensor, products: Tensor, shift: float, epsilon: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As _solved, for Δ = Dᵀ (K + s 1)⁻¹ A."""
    factor = positive_factor(products, shift, epsilon)
    if not factors_are_smaller(len(inputs), targets.shape[1], inputs.shape[1]):  # then Δ itself costs less than they do
        left = torch.cholesky_solve(targets, factor)
        return left.T @ inputs, None, shift * left
    left, right = (
        torch.linalg.solve_triangular(factor.T, rows.T, upper=True, left=False) for rows in (targets, inputs)
    )
    # targets − K (K + s 1)⁻¹ targets = s (K + s 1)⁻¹ targets
    return left, right, shift * torch.linalg.solve_triangular(factor, left, upper=False, left=False).T


def sphericity(gram: Tensor, width: int) -> tuple[float | None, float | None]:
    """(‖Z − (tr Z/d) 1‖_F / ‖Z‖_F, d / tr Z) from Z [d, d], or K [N, N] of the same rows of width d; None for Z = 0.

    Source: "Transmuting prompts into weights", A.1, case 4, and Lemma B.7.
    """
    trace, squares = float(gram.trace()), _squares(gram)
    if trace <= 0:
        return None, None
    return math.sqrt(max(0.0, 1 - trace**2 / (width * squares))), width / trace


def _products(inputs: Tensor) -> Tensor:
    """K = A Aᵀ, float64, each pair of blocks of rows multiplied once, which takes about as long as all in float32.

    Float32 would not do: real rows have a large common part, whose rounding costs more than 1e-6 of what Δ does.
    """
    products = inputs.new_empty(len(inputs), len(inputs))
    for start in range(0, len(inputs), _PRODUCT_ROWS):
        stop = start + _PRODUCT_ROWS
        products[start:stop, :stop] = inputs[start:stop] @ inputs[:stop].T
        products[:start, start:stop] = products[start:stop, :start].T
    return products


def positive_factor(gram: Tensor, shift: float | Tensor, epsilon: float | Tensor) -> Tensor:
    """The float64 Cholesky factor of a Gram matrix plus diag(s), s = ε times its mean eigenvalue; the lower triangle.

    Raises:
        ValueError: the sum is not positive definite to rounding.
    """
    shifted = gram.to(torch.float64, copy=True)
    shifted.diagonal().add_(shift)
    if not factorised(shifted) or not bool(torch.as_tensor(shift > 0).all()):
        least = float(torch.as_tensor(epsilon).min())
        raise ValueError(
            f"solve: ridge must make Z positive definite, got {least:g}; "
            "rounding in the sums outweighs it: raise it, accumulate in float64, or use estimator 'exact'"
        )
    return shifted


def factorised(matrix: Tensor) -> bool:
    """Whether a symmetric matrix is positive definite to rounding; its lower triangle then holds its Cholesky factor.

    torch's own factorisation copies a triangle element by element down its columns, which takes longer than LAPACK's
    part: it is given blocks that stay in cache, and the rest is products of blocks.
    """
    for start in range(0, len(matrix), _FACTOR_COLUMNS):
        stop = start + _FACTOR_COLUMNS
        columns = matrix[start:, start:stop]
        columns.addmm_(matrix[start:, :start], matrix[start:stop, :start].T, alpha=-1)
        factor, info = torch.linalg.cholesky_ex(columns[:_FACTOR_COLUMNS])
        if int(info):
            return False
        columns[:_FACTOR_COLUMNS] = factor
        below = columns[_FACTOR_COLUMNS:]
        below.copy_(torch.linalg.solve_triangular(factor.T, below, upper=True, left=False))
    return True


def _roots(activation: Tensor, w: Tensor, normalization: str) -> Tensor:
    """√(w/ν) of every row, 0 where ν is."""
    if normalization == "none":
        return w.sqrt()
    nu = torch.linalg.vector_norm(activation, dim=1, dtype=w.dtype)
    nu = nu.square() if normalization == "squared_norm" else nu
    return torch.where(nu == 0, 0, w / nu).sqrt()


def _second_order_scale(products: Tensor, targets: Tensor) -> float | None:
    """From K and D: with C = Dᵀ A and Z = Aᵀ A, ⟨C, C⟩ = ⟨D, K D⟩ and every further Z is a further K."""
    once = products @ targets
    twice = products @ once
    return second_order_scale((_inner(targets, once), _squares(once), _inner(once, twice), _squares(twice)))


def _inner(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())


def _squares(rows: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows)) ** 2


def _fold_residual(inputs: Tensor, mean: Tensor, total: float) -> float | None:
    """As estimators' from the sums: Σ w (āᵀa)²/‖ā‖⁴ / Ω − 1, ā the mean."""
    norm = _squares(mean)
    return None if norm == 0 else max(0.0, _squares(inputs @ mean) / total / norm**2 - 1)
