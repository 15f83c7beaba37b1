"""Eigenvalues and eigenspaces of the frame operator, in float64, grouped where they are equal to a tolerance.

F's positive spectrum is that of M, whichever is smaller is decomposed, and either side's eigenvectors give the other's:
W v_e = √λ_e u_e and Wᵀ u_e = √λ_e v_e.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from thought_kernels.ops.checks import check_number
from thought_kernels.ops.library import message
from thought_kernels.spectral.frames import check_matrix, column_blocks, frame_operator, gram, in_range

RTOL = 1e-6

# Squaring W loses digits: below this ratio of F's eigenvalues σ and its vectors are taken from W itself, by QR.
_WELL_CONDITIONED = 1e-4
_QR_ROWS = 8192


@dataclass(frozen=True, eq=False)
class FrameSpectrum:
    """The positive spectrum of F = W Wᵀ and of M = Wᵀ W; all tensors are float64, largest eigenvalue first.

    Attributes:
        matrix: W as given ``[m, n]``, detached; W / 2^exponent where its squares would leave float64's range.
        exponent: 0 unless W was rescaled.
        all_eigenvalues: the r positive eigenvalues of ``matrix`` ``[r]``, one for each dimension.
        groups: for each of them its eigenspace's index ``[r]``, 0 to E − 1.
        short_basis: eigenvectors of F ``[m, r]`` where m ≤ n, else of M ``[n, r]``.
        rtol: eigenvalues no further than this, times the largest, from a neighbour share an eigenspace.
    """

    matrix: Tensor
    exponent: int
    all_eigenvalues: Tensor
    groups: Tensor
    short_basis: Tensor
    rtol: float

    @property
    def rank(self) -> int:
        """Number of positive eigenvalues."""
        return len(self.all_eigenvalues)

    @functools.cached_property
    def multiplicities(self) -> Tensor:
        """Dimension of each eigenspace ``[E]``, int64."""
        return torch.bincount(self.groups)

    @functools.cached_property
    def eigenvalues(self) -> Tensor:
        """λ_e of each eigenspace ``[E]``, the mean over its dimensions; of W, not of a rescaled ``matrix``."""
        means = self.sum_groups(self.all_eigenvalues[None])[0] / self.multiplicities
        return self.unscale(means)

    @functools.cached_property
    def frame_basis(self) -> Tensor:
        """Orthonormal eigenvectors u of F ``[m, r]``, in the order of ``groups``."""
        if self._frame_is_short:
            return self.short_basis
        return self.matrix.double() @ self.short_basis / self.all_eigenvalues.sqrt()

    @functools.cached_property
    def gram_basis(self) -> Tensor:
        """Orthonormal eigenvectors v of M ``[n, r]``, in the order of ``groups``."""
        if not self._frame_is_short:
            return self.short_basis
        blocks = [coefficients / self.all_eigenvalues.sqrt() for _, coefficients in self.coefficients()]
        return torch.cat(blocks)

    def frame_projector(self, index: int) -> Tensor:
        """P_e, the orthogonal projector ``[m, m]`` on F's eigenspace ``index``."""
        basis = self.frame_basis[:, self.groups == index]
        return basis @ basis.T

    def gram_projector(self, index: int) -> Tensor:
        """E_e, the orthogonal projector ``[n, n]`` on M's eigenspace ``index``."""
        basis = self.gram_basis[:, self.groups == index]
        return basis @ basis.T

    def coefficients(self) -> Iterator[tuple[slice, Tensor]]:
        """u_eᵀ w_i ``[features, r]`` for blocks of features, each with the columns of W it is about."""
        for columns in column_blocks(self.matrix):
            if self._frame_is_short:
                yield columns, self.matrix[:, columns].double().T @ self.short_basis
            else:
                yield columns, self.short_basis[columns] * self.all_eigenvalues.sqrt()

    def sum_groups(self, values: Tensor) -> Tensor:
        """``[..., r]`` summed over each eigenspace: ``[..., E]``."""
        count = int(self.groups[-1]) + 1 if self.rank else 0
        if count == self.rank:
            return values.clone()
        return values.new_zeros(*values.shape[:-1], count).index_add_(-1, self.groups, values)

    def unscale(self, values: Tensor, order: int = 1) -> Tensor:
        """What is of the order λ^order for ``matrix``, for W; may overflow where W was rescaled."""
        return values * torch.tensor(4.0, dtype=torch.float64).pow(self.exponent * order).to(values.device)

    @property
    def _frame_is_short(self) -> bool:
        return self.matrix.shape[0] <= self.matrix.shape[1]


def frame_spectrum(W: Tensor, *, rtol: float = RTOL, rank_rtol: float | None = None) -> FrameSpectrum:
    """Eigenvalues and eigenspaces of the frame operator, with the maps between them and those of the Gram matrix.

    F = Σ_e λ_e P_e,  M = Σ_e λ_e E_e,  P_e = W E_e Wᵀ / λ_e,  P_e W = W E_e,  λ_e > 0

    F (or M, where it is smaller) is summed in float64. If its eigenvalues span more than four decades, singular values
    come from a QR factorisation of W instead, since squaring has lost the small ones.

    Args:
        W: ``[m, n]``, features in columns; float64, float32, bfloat16 or float16, finite.
        rtol: eigenvalues, sorted, whose neighbours differ by at most ``rtol`` times the largest eigenvalue form one
            eigenspace; gaps are chained.
        rank_rtol: singular values up to ``rank_rtol`` times the largest count as zero; max(m, n) · eps by default, with
            the eps of W's dtype (float32's for the 16-bit dtypes). Pass a smaller one for a long, ill-conditioned W.

    Returns:
        A FrameSpectrum; rank 0 and no eigenspaces where W is zero.

    Raises:
        TypeError, ValueError: as frame_operator does; for a tolerance that is not a number in [0, 1).

    Source: Spectral superposition, Lemmas B.1, B.3 and B.4.
    """
    return decompose("frame_spectrum", W, rtol, rank_rtol)


def decompose(function: str, W: Tensor, rtol: float = RTOL, rank_rtol: float | None = None) -> FrameSpectrum:
    """frame_spectrum for the function whose name its errors carry."""
    largest = check_matrix(function, W)
    for name, value in (("rtol", rtol), ("rank_rtol", rank_rtol)):
        if value is not None:
            check_number(function, name, value, or_zero=True)
            if value >= 1:
                raise ValueError(message(function, name, "be less than 1", value))
    if rank_rtol is None:
        eps = torch.finfo(torch.float64 if W.dtype == torch.float64 else torch.float32).eps
        rank_rtol = max(W.shape) * eps
    matrix, exponent = in_range(W.detach(), largest, torch.float64)
    singular, basis = _short_side(matrix)
    kept = (singular > rank_rtol * singular[0]) if largest else torch.zeros_like(singular, dtype=torch.bool)
    eigenvalues = singular[kept].square()
    groups = group_values(eigenvalues, rtol * float(eigenvalues[0])) if len(eigenvalues) else kept[:0].long()
    return FrameSpectrum(matrix, exponent, eigenvalues, groups, basis[:, kept], rtol)


def group_values(values: Tensor, tolerance: float) -> Tensor:
    """The group of each of sorted values ``[r]``, counted from 0: a new one begins where a gap exceeds tolerance."""
    starts = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    starts[1:] = values.diff().abs() > tolerance
    return starts.cumsum(0)


def _short_side(W: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of W, largest first, and the singular vectors of its shorter side, in float64."""
    m, n = W.shape
    square = frame_operator(W, dtype=torch.float64) if m <= n else gram(W, dtype=torch.float64)
    eigenvalues, basis = torch.linalg.eigh(square)
    if eigenvalues[0] > _WELL_CONDITIONED * eigenvalues[-1]:
        return eigenvalues.flip(0).sqrt(), basis.flip(1)
    if not square.any():
        return torch.zeros_like(eigenvalues), basis
    basis, singular, _ = torch.linalg.svd(triangle(W if m <= n else W.T))
    return singular, basis


def triangle(A: Tensor) -> Tensor:
    """L ``[k, k]`` with L Lᵀ = A Aᵀ for A ``[k, long]``, by QR of blocks of columns, never by squaring."""
    k, length = A.shape
    upper = A.new_zeros(0, k, dtype=torch.float64)
    step = max(_QR_ROWS, 2 * k)
    for start in range(0, length, step):
        upper = torch.linalg.qr(torch.cat([upper, A[:, start : start + step].T.double()]), mode="r")[1]
    return upper.T
