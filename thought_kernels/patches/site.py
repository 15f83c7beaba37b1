"""What a patch does at one site of one block: a matrix (dense or low-rank), a vector, and how well they were fitted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thought_kernels.models.linear import linear

SITES = ("attention", "mlp", "down", "residual")
MATRIX_SITES = ("attention", "mlp", "down")
# In the order in which a block's sites are fitted, each stage after the ones before it are applied. Both of the second
# are read at the attention's output; `down` is read at the block's, and mends what all others left.
STAGES = (frozenset({"attention"}), frozenset({"mlp", "residual"}), frozenset({"down"}))
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that arithmetic on CPUs is made for


@dataclass(frozen=True)
class Fit:
    """How the patch of one site was fitted; fields that later arithmetic makes meaningless become None.

    Attributes:
        rows: token rows with nonzero weight that entered the sums.
        residual: Σ (w/ν) ‖Δ a + v − δ‖² / Σ (w/ν) ‖δ‖² of the patch as solved, scale included.
        condition: condition number of the Gram matrix Z (centred for ``affine``); inf if it is numerically singular.
        fold_residual: relative squared error of replacing a vector v by the matrix v āᵀ/‖ā‖² on the fitted rows.
        anisotropy: ‖Z − (tr Z/d) 1‖_F / ‖Z‖_F, from 0 for spherical rows, whose Z is a multiple of the identity, to 1.
        spherical_scale: d / tr Z, the λ with which ``mean`` is the least-squares matrix of spherical rows, 1/(σ² n).
        best_scale: the λ of this estimator with the least residual on these rows; None where the patch predicts 0.
    """

    rows: int
    residual: float | None = None
    condition: float | None = None
    fold_residual: float | None = None
    anisotropy: float | None = None
    spherical_scale: float | None = None
    best_scale: float | None = None


@dataclass(frozen=True)
class SitePatch:
    """The change x -> x + Δ x + v at one site; at ``down`` that of the output, W z -> W z + Δ z + v.

    Attributes:
        matrix: dense Δ ``[d_out, d_in]``, or None. Only at ``down`` the two widths differ.
        factors: ``(U, V)``, ``[d_out, r]`` and ``[d_in, r]``, with Δ = U Vᵀ, or None; never given together with
            ``matrix``.
        vector: v ``[d_out]``, or None.
        activation_mean: the fitted rows' weighted mean activation ``[d_in]``, which folding a vector needs, or None.
        fit: how it was fitted, or None.
    """

    matrix: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    vector: Tensor | None = None
    activation_mean: Tensor | None = None
    fit: Fit | None = None

    def __post_init__(self) -> None:
        if self.matrix is not None and self.factors is not None:
            raise ValueError("SitePatch: matrix must be None where factors are given, got both")
        if self.matrix is None and self.factors is None and self.vector is None:
            raise ValueError("SitePatch: matrix, factors or vector must be given, got none of them")
        d_out, d_in = self.output_width, self.input_width or 0
        rank = self.factors[0].shape[-1] if self.factors else 0
        expected = {
            "matrix": (d_out, d_in),
            "left": (d_out, rank),
            "right": (d_in, rank),
            "vector": (d_out,),
            "activation_mean": (d_in,),
        }
        for name, tensor in self.tensors().items():
            if tensor.dtype not in DTYPES:
                raise TypeError(f"SitePatch: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
            if tuple(tensor.shape) != expected[name]:
                raise ValueError(f"SitePatch: {name} must have shape {list(expected[name])}, got {list(tensor.shape)}")

    @property
    def output_width(self) -> int:
        """The width d_out of what is added."""
        for tensor in (self.matrix, self.vector, self.factors and self.factors[0]):
            if tensor is not None:
                return tensor.shape[0] if tensor.ndim else 0
        return 0

    @property
    def input_width(self) -> int | None:
        """The width d_in of the activation that Δ multiplies; None for a mere vector."""
        for tensor in (self.matrix, self.factors and self.factors[1], self.activation_mean):
            if tensor is not None:
                return tensor.shape[-1 if tensor is self.matrix else 0] if tensor.ndim else 0
        return None

    @property
    def rank(self) -> int | None:
        """Columns of the low-rank factors, None for a dense matrix or none at all."""
        return self.factors[0].shape[1] if self.factors is not None else None

    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by name: matrix, or left and right, vector, activation_mean."""
        left, right = self.factors or (None, None)
        named = {
            "matrix": self.matrix,
            "left": left,
            "right": right,
            "vector": self.vector,
            "activation_mean": self.activation_mean,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def dense(self) -> Tensor | None:
        """Δ as a dense ``[d_out, d_in]`` tensor, or None where the site has no matrix."""
        if self.factors is not None:
            left, right = self.factors
            return left @ right.T
        return self.matrix

    def shift(self, x: Tensor) -> Tensor:
        """Δ x + v of every row x ``[..., d_in]``, which must be in the patch's dtype and on its device."""
        shift = x.new_zeros(())
        if self.factors is not None:
            left, right = self.factors
            shift = linear(linear(x, right.T), left)
        elif self.matrix is not None:
            shift = linear(x, self.matrix)
        return shift if self.vector is None else (shift + self.vector).expand(*x.shape[:-1], -1)

    def norm(self) -> float:
        """‖Δ‖_F, from the factors' small Gram matrices where Δ is low-rank."""
        if self.factors is not None:
            left, right = (factor.double() for factor in self.factors)
            return math.sqrt(max(0.0, float(((left.T @ left) * (right.T @ right)).sum())))
        return float(torch.linalg.vector_norm(self.matrix.double())) if self.matrix is not None else 0.0

    def scaled(self, factor: float) -> SitePatch:
        """factor · (Δ, v); low-rank stays low-rank."""
        return replace(
            self,
            matrix=None if self.matrix is None else self.matrix * factor,
            factors=None if self.factors is None else (self.factors[0] * factor, self.factors[1]),
            vector=None if self.vector is None else self.vector * factor,
            fit=None if self.fit is None else replace(self.fit, residual=None, best_scale=None),
        )

    def plus(self, other: SitePatch) -> SitePatch:
        """(Δ + Δ', v + v'); two low-rank matrices stay low-rank, their factors side by side, where that is smaller."""
        factors, matrix = None, None
        rank = (self.rank or 0) + (other.rank or 0)
        low = self.factors is not None and other.factors is not None
        if low and factors_are_smaller(rank, self.output_width, self.input_width or 0):
            assert self.factors is not None and other.factors is not None
            left, right = (torch.cat([a, b.to(a)], dim=1) for a, b in zip(self.factors, other.factors, strict=True))
            factors = (left, right)
        else:
            matrix = _sum(self.dense(), other.dense())
        # A fit belongs to the rows of one accumulator. A vector folds along its own rows' mean activation; two of
        # them fold along the mean of both, whose error on either set of rows is unknown.
        with_vector = [patch for patch in (self, other) if patch.vector is not None]
        means = [patch.activation_mean for patch in with_vector if patch.activation_mean is not None]
        mean = sum((m.to(means[0]) for m in means[1:]), means[0]) / len(means) if means else None
        return SitePatch(matrix, factors, _sum(self.vector, other.vector), mean)

    def folded(self) -> SitePatch:
        """Δ + v āᵀ/‖ā‖² in place of Δ and v, ā the mean activation, which must be known and not zero."""
        assert self.vector is not None and self.activation_mean is not None
        mean = self.activation_mean / self.activation_mean.square().sum()
        if self.factors is not None:
            left, right = (
                torch.cat([factor, column[:, None]], dim=1)
                for factor, column in zip(self.factors, (self.vector, mean), strict=True)
            )
            return SitePatch(factors=(left, right))
        return SitePatch(matrix=_sum(torch.outer(self.vector, mean), self.matrix))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular value decomposition Δ = U diag(s) Vᵀ in float64, s descending.

        Returns:
            U ``[d_out, k]``, s ``[k]`` and V ``[d_in, k]``. k is the smaller width for a dense matrix, the factors'
            own if that is smaller yet, and 0 where there is no matrix.
        """
        if self.factors is not None:
            # U Vᵀ = Q_U (R_U R_Vᵀ) Q_Vᵀ: the decomposition of the small middle matrix is that of the product.
            (q_left, r_left), (q_right, r_right) = (torch.linalg.qr(factor.double()) for factor in self.factors)
            u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
            return q_left @ u, s, q_right @ vh.T
        if self.matrix is None:
            left, right = (torch.zeros(d or 0, 0, dtype=torch.float64) for d in (self.output_width, self.input_width))
            return left, torch.zeros(0, dtype=torch.float64), right
        u, s, vh = torch.linalg.svd(self.matrix.double(), full_matrices=False)
        return u, s, vh.T

    def truncated(self, rank: int) -> SitePatch:
        """The best approximation of Δ of the given rank, by singular value decomposition; the vector is kept."""
        fit = None if self.fit is None else replace(self.fit, residual=None, best_scale=None)
        stored = self.matrix if self.factors is None else self.factors[0]
        if stored is None or (self.factors is not None and stored.shape[1] <= rank):
            return self
        (left, s, right), dtype = self.svd(), stored.dtype
        factors = ((left[:, :rank] * s[:rank]).to(dtype), right[:, :rank].to(dtype).contiguous())
        return replace(self, matrix=None, factors=factors, fit=fit)

    def part(self, keep: Callable[[Tensor], Tensor], *, outputs: bool) -> SitePatch:
        """Some outputs of Δ and v, or Δ on some inputs without v: `keep` is given what it may keep rows of."""
        matrix, factors = self.matrix, self.factors
        if outputs:
            matrix = None if matrix is None else keep(matrix)
            factors = None if factors is None else (keep(factors[0]), factors[1])
            return SitePatch(matrix, factors, None if self.vector is None else keep(self.vector))
        matrix = None if matrix is None else keep(matrix.T).T
        return SitePatch(matrix, None if factors is None else (factors[0], keep(factors[1])))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SitePatch:
        """The same patch with its tensors on another device or in another floating dtype."""
        moved = {name: tensor.to(device=device, dtype=dtype) for name, tensor in self.tensors().items()}
        factors = (moved["left"], moved["right"]) if "left" in moved else None
        return SitePatch(moved.get("matrix"), factors, moved.get("vector"), moved.get("activation_mean"), self.fit)


def factors_are_smaller(rank: int, d_out: int, d_in: int) -> bool:
    """Whether factors of a rank above 0 take less memory than the matrix."""
    return 0 < rank * (d_out + d_in) < d_out * d_in


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, without a temporary of the tensor's size."""
    if tensor.numel() == 0:
        return True
    # NaN propagates through both extremes, and an infinity is one. They come to the host in one copy.
    return all(map(math.isfinite, torch.stack(torch.aminmax(tensor)).tolist()))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b.to(a)
