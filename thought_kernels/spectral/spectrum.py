"""Eigenvalues and eigenspaces of the frame operator, in float64, grouped where they are equal to a tolerance.

F and M have the same positive spectrum, and either one's eigenvectors give the other's:
W v_e = √λ_e u_e and Wᵀ u_e = √λ_e v_e.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from thought_kernels.ops.checks import check_number
from thought_kernels.ops.library import message
from thought_kernels.spectral.frames import check_matrix, column_blocks, frame_operator, in_range, triangle

RTOL = 1e-6

# Squaring W loses digits: below this ratio of F's eigenvalues σ and its vectors are taken from W itself, by QR.
_WELL_CONDITIONED = 1e-4
_OUTSIDE = 1e-8  # of a feature's norm: less than this within the range is rounding


@dataclass(frozen=True, eq=False)
class FrameSpectrum:
    """The positive spectrum of F = W Wᵀ and of M = Wᵀ W; all tensors are float64, largest eigenvalue first.

    Attributes:
        matrix: W as given ``[m, n]``, detached; W / 2^exponent where its squares would leave float64's range.
        exponent: 0 unless W was rescaled.
        columns: ``matrix`` where m ≤ n, else R ``[n, n]`` of its QR factorisation, whose Gram matrix is the same.
        all_eigenvalues: the r positive eigenvalues of ``matrix`` ``[r]``, one for each dimension.
        groups: for each of them its eigenspace's index ``[r]``, 0 to E − 1.
        basis: orthonormal eigenvectors of columns columnsᵀ ``[min(m, n), r]``.
        right: those of M ``[n, r]`` where n < m; None elsewhere, where they may be too large to keep.
        rtol: eigenvalues within this, times the largest, of one another share an eigenspace.
    """

    matrix: Tensor
    exponent: int
    columns: Tensor
    all_eigenvalues: Tensor
    groups: Tensor
    basis: Tensor
    right: Tensor | None
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
        if self.right is None:
            return self.basis
        return self.matrix.double() @ self.gram_basis / self.all_eigenvalues.sqrt()

    @functools.cached_property
    def gram_basis(self) -> Tensor:
        """Orthonormal eigenvectors v of M ``[n, r]``, in the order of ``groups``."""
        if self.right is not None:
            return self.right
        return torch.cat([coefficients for _, coefficients in self.coefficients()]) / self.all_eigenvalues.sqrt()

    def frame_projector(self, index: int) -> Tensor:
        """P_e, the orthogonal projector ``[m, m]`` on F's eigenspace ``index``."""
        basis = self.frame_basis[:, self.groups == index]
        return basis @ basis.T

    def gram_projector(self, index: int) -> Tensor:
        """E_e, the orthogonal projector ``[n, n]`` on M's eigenspace ``index``."""
        basis = self.gram_basis[:, self.groups == index]
        return basis @ basis.T

    def coefficients(self) -> Iterator[tuple[slice, Tensor]]:
        """u_eᵀ w_i ``[features, r]`` for blocks of features, each with the columns of W it is about.

        Exactly zero for a feature outside the range, of which a product with the basis leaves rounding only.
        """
        return _coefficients(self.columns, self.basis)

    def sum_groups(self, values: Tensor) -> Tensor:
        """``[..., r]`` summed over each eigenspace: ``[..., E]``."""
        count = int(self.groups[-1]) + 1 if self.rank else 0
        if count == self.rank:
            return values.clone()
        return values.new_zeros(*values.shape[:-1], count).index_add_(-1, self.groups, values)

    def unscale(self, values: Tensor, order: int = 1) -> Tensor:
        """What is of the order λ^order for ``matrix``, for W; may overflow where W was rescaled."""
        return values * torch.tensor(4.0, dtype=torch.float64).pow(self.exponent * order).to(values.device)


def frame_spectrum(W: Tensor, *, rtol: float = RTOL, rank_rtol: float | None = None) -> FrameSpectrum:
    """Eigenvalues and eigenspaces of the frame operator, with the maps between them and those of the Gram matrix.

    F = Σ_e λ_e P_e,  M = Σ_e λ_e E_e,  P_e = W E_e Wᵀ / λ_e,  P_e W = W E_e,  λ_e > 0

    F is summed in float64. If its eigenvalues span more than four decades, singular values come from a QR
    factorisation of W instead, since squaring loses the small ones; a W with fewer features than rows starts with one.

    Args:
        W: ``[m, n]``, features in columns; float64, float32, bfloat16 or float16, finite.
        rtol: eigenvalues within ``rtol`` times the largest of one another form one eigenspace. A run of small gaps
            that is wider in all is cut at its largest gap, and so on.
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
    for name, value in {"rtol": rtol, **({} if rank_rtol is None else {"rank_rtol": rank_rtol})}.items():
        check_number(function, name, value, or_zero=True)
        if value >= 1:
            raise ValueError(message(function, name, "be less than 1", value))
    if rank_rtol is None:
        eps = torch.finfo(torch.float64 if W.dtype == torch.float64 else torch.float32).eps
        rank_rtol = max(W.shape) * eps
    matrix, exponent = in_range(W.detach(), largest, torch.float64)
    # Column by column R errs by eps of that column, so that a feature's size does not matter; zeros stay zeros.
    if W.shape[0] <= W.shape[1]:
        columns, right = matrix, None
        singular, basis = _left_singular(columns)
    else:
        columns = triangle(matrix.T).T
        basis, singular, right = torch.linalg.svd(columns)
    kept = (singular > rank_rtol * singular[0]) if largest else torch.zeros_like(singular, dtype=torch.bool)
    eigenvalues = singular[kept].square()
    basis, right = basis[:, kept], None if right is None else right.T[:, kept]
    if len(eigenvalues) and eigenvalues[-1] <= _WELL_CONDITIONED * eigenvalues[0]:
        # Rounding of W's largest part is in u_e too: λ_e = ‖Wᵀu_e‖² knows of it, so that Σ_i ℓ_i is still the rank.
        energies = [block.square().sum(0) for _, block in _coefficients(columns, basis)]
        eigenvalues, order = torch.stack(energies).sum(0).sort(descending=True)
        basis, right = basis[:, order], None if right is None else right[:, order]
    groups = group_values(eigenvalues, rtol * float(eigenvalues[0])) if len(eigenvalues) else kept[:0].long()
    return FrameSpectrum(matrix, exponent, columns, eigenvalues, groups, basis, right, rtol)


def _coefficients(columns: Tensor, basis: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for block in column_blocks(columns):
        vectors = columns[:, block].double()
        coefficients = vectors.T @ basis
        norms = torch.linalg.vector_norm(vectors, dim=0)
        outside = torch.linalg.vector_norm(coefficients, dim=1) <= _OUTSIDE * norms
        yield block, coefficients.masked_fill_(outside[:, None], 0)


def group_values(values: Tensor, tolerance: float) -> Tensor:
    """The group of each of sorted values ``[r]``, counted from 0; none is wider than tolerance.

    A new group begins where a gap exceeds the tolerance. What is still wider, being chained by small gaps, is cut at
    its largest gap until nothing is: so a continuous spectrum does not pass for one value.
    """
    starts = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    if len(values):
        gaps = values.diff().abs()
        starts[1:] = gaps > tolerance
        bounds = [0, *(starts.nonzero()[:, 0].tolist()), len(values)]
        pending = list(itertools.pairwise(bounds))
        while pending:
            first, end = pending.pop()
            if float((values[first] - values[end - 1]).abs()) > tolerance:
                cut = first + 1 + int(gaps[first : end - 1].argmax())
                starts[cut] = 1
                pending += [(first, cut), (cut, end)]
    return starts.cumsum(0)


def _left_singular(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, largest first, and left singular vectors of a matrix that is not taller than wide."""
    F = frame_operator(columns, dtype=torch.float64)
    eigenvalues, basis = torch.linalg.eigh(F)
    if eigenvalues[0] > _WELL_CONDITIONED * eigenvalues[-1]:
        return eigenvalues.flip(0).sqrt(), basis.flip(1)
    basis, singular, _ = torch.linalg.svd(triangle(columns))
    return singular, basis
