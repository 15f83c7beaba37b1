"""The empirical spectral density of a weight matrix, and its ranks in the soft sense."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thought_kernels.ops.library import message
from thought_kernels.spectral.spectrum import decompose


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """The eigenvalues of W Wᵀ and how they are distributed.

    Attributes:
        eigenvalues: all min(m, n) of them ``[k]``, float64, largest first, those outside the rank as 0.
        rank: how many are positive.
    """

    eigenvalues: Tensor
    rank: int

    @property
    def stable_rank(self) -> float:
        """‖W‖_F² / ‖W‖₂² = Σ λ / λ_max; 0 for W = 0."""
        return float((self.eigenvalues / self.eigenvalues[0]).sum()) if self.rank else 0.0

    @property
    def effective_rank(self) -> float:
        """exp(−Σ q ln q) with q = λ / Σ λ, the exponential of the spectrum's entropy; 0 for W = 0."""
        if not self.rank:
            return 0.0
        positive = self.eigenvalues[: self.rank] / self.eigenvalues[0]
        q = positive / positive.sum()
        return float(torch.exp(torch.special.entr(q).sum()))

    def histogram(self, bins: int = 100, *, log: bool = False) -> tuple[Tensor, Tensor]:
        """The density of the positive eigenvalues over equal bins.

        Args:
            bins: number of them.
            log: bins of log10 λ, and a density over log10 λ.

        Returns:
            Density ``[bins]``, with Σ density · width = 1, and edges ``[bins + 1]`` (of λ or of log10 λ).

        Raises:
            TypeError, ValueError: ``bins`` is not a positive integer; the rank is 0.
        """
        if isinstance(bins, bool) or not isinstance(bins, int):
            raise TypeError(message("histogram", "bins", "be an integer", type(bins).__name__))
        if bins < 1:
            raise ValueError(message("histogram", "bins", "be at least 1", bins))
        if not self.rank:
            raise ValueError(message("histogram", "eigenvalues", "hold a positive one", "rank 0"))
        positive = self.eigenvalues[: self.rank].cpu()
        return torch.histogram(positive.log10() if log else positive, bins, density=True)


def empirical_spectral_density(
    W: Tensor, *, normalize: bool = False, rank_rtol: float | None = None
) -> SpectralDensity:
    """The eigenvalues of the frame operator as a distribution.

    λ_k = ν_k², the squared singular values of W; with ``normalize`` those of X = W Wᵀ / max(m, n)

    Args:
        W: ``[m, n]``; float64, float32, bfloat16 or float16, finite. W and Wᵀ have the same density.
        normalize: divide by max(m, n), as is usual where layers of different sizes are compared.
        rank_rtol: singular values up to this times the largest count as zero; max(m, n) · eps of W's dtype by default.

    Returns:
        A SpectralDensity.

    Raises:
        TypeError, ValueError: as frame_operator does; a tolerance outside [0, 1).

    Source: Spectral superposition, §3 and §E.1.
    """
    spectrum = decompose("empirical_spectral_density", W, rank_rtol=rank_rtol)
    eigenvalues = torch.zeros(min(W.shape), dtype=torch.float64, device=W.device)
    eigenvalues[: spectrum.rank] = spectrum.unscale(spectrum.all_eigenvalues)
    return SpectralDensity(eigenvalues / max(W.shape) if normalize else eigenvalues, spectrum.rank)
