"""Features grouped by the eigenspace they lie in: tight frames, and the line that D_i against ‖w_i‖² lies on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from thought_kernels.ops.checks import check_number
from thought_kernels.ops.library import message
from thought_kernels.spectral.measure import features_of, nonzero_spectrum
from thought_kernels.spectral.spectrum import RTOL, FrameSpectrum

LOCALIZATION = 1e-6  # the share of a feature's squared norm that may lie outside its eigenspace


@dataclass(frozen=True, eq=False)
class TightFrame:
    """The features that lie in one eigenspace of F.

    Attributes:
        features: their column indices in W ``[p]``, int64, ascending.
        eigenvalue: λ, the frame constant.
        dimension: d, of the eigenspace.
        vectors: W_C ``[m, p]``, in W's dtype.
        residual: ‖W_C W_Cᵀ − λ P‖_F / (λ √d): 0 for a tight frame of the whole eigenspace, larger where features that
            are not localized share it.
    """

    features: Tensor
    eigenvalue: float
    dimension: int
    vectors: Tensor
    residual: float

    def __repr__(self) -> str:
        return (
            f"TightFrame({len(self.features)} features in {self.dimension} dimensions, "
            f"eigenvalue {self.eigenvalue:.6g}, residual {self.residual:.1e})"
        )


class ClusterFit(NamedTuple):
    """How well one cluster follows D_i = ‖w_i‖² / λ.

    Attributes:
        features: column indices ``[p]``, int64: the nonzero features that have most of their norm here.
        eigenvalue: λ of the eigenspace.
        dimension: of the eigenspace.
        spread: (λ_max − λ_min) / λ_max over the eigenvalues that were grouped as this one.
        localization: mean over the features of max_e p_ie.
        slope: k of the least-squares line D = k ‖w‖² through the origin.
        r_squared: 1 − Σ (D_i − ‖w_i‖²/λ)² / Σ D_i², of the line with slope 1/λ, about the origin.
        error: |k λ − 1|.
    """

    features: Tensor
    eigenvalue: float
    dimension: int
    spread: float
    localization: float
    slope: float
    r_squared: float
    error: float


def tight_frames(
    W: Tensor, *, rtol: float = RTOL, localization: float = LOCALIZATION, rank_rtol: float | None = None
) -> list[TightFrame]:
    """The tight frames that localized features form, one for each eigenspace that holds any.

    C_e = {i : 1 − p_ie ≤ localization},  W_C W_Cᵀ = λ_e P_e  if all features are localized

    Frames of equal eigenvalue come as one; identify_components takes them apart. Features spread over several
    eigenspaces, and zero features, belong to none. The defaults are for exact frames: of a trained matrix no feature is
    an eigenvector to 1e-6 and hardly any two eigenvalues are equal. There a frame is a matter of degree: ask with
    ``rtol=0.02, localization=0.49`` for every cluster that has most of its features' norm, and judge by the residual.

    Args:
        W: ``[m, n]``, features in columns; float64, float32, bfloat16 or float16, finite and not all zero.
        rtol: eigenvalues within ``rtol`` times the largest of one another are one.
        localization: share of a feature's squared norm that may lie outside, in [0, 0.5).
        rank_rtol: singular values up to this times the largest count as zero; max(m, n) · eps of W's dtype by default.

    Returns:
        TightFrame objects with ``features``, ``eigenvalue``, ``dimension``, largest eigenvalue first.

    Raises:
        TypeError, ValueError: as spectral_measure does; a localization outside [0, 0.5).

    Source: Spectral superposition, Theorem 3.
    """
    check_number("tight_frames", "localization", localization, or_zero=True)
    if localization >= 0.5:
        raise ValueError(message("tight_frames", "localization", "be less than 0.5", localization))
    spectrum = nonzero_spectrum("tight_frames", W, rtol, rank_rtol)
    measures = features_of(spectrum)
    inside = measures.peak >= 1 - localization
    frames = []
    for index, (eigenvalue, dimension) in enumerate(zip(spectrum.eigenvalues, spectrum.multiplicities, strict=True)):
        features = torch.nonzero(inside & (measures.eigenspace == index))[:, 0]
        if len(features) == 0:
            continue
        residual = frame_residual(spectrum, features, index)
        frames.append(TightFrame(features, float(eigenvalue), int(dimension), W.detach()[:, features], residual))
    return frames


def frame_residual(spectrum: FrameSpectrum, features: Tensor, index: int) -> float:
    """‖W_C W_Cᵀ − λ P‖_F / (λ √d) of some features and an eigenspace: 0 where they are a tight frame of it."""
    # ‖F_C − λP‖² = ‖F_C‖² − 2λ tr(P F_C) + λ²d cancels, so F_C is taken in eigenvectors, where P is diagonal.
    local = spectrum.frame_basis.T @ spectrum.matrix[:, features].double()
    target = spectrum.all_eigenvalues * (spectrum.groups == index)
    return float((local @ local.T - target.diag()).norm() / target.norm())


def projective_linearity(W: Tensor, *, rtol: float = RTOL, rank_rtol: float | None = None) -> list[ClusterFit]:
    """How closely each cluster of features follows the line that localization implies.

    D_i = ‖w_i‖² / λ_e for a localized feature;  k = Σ D_i ‖w_i‖² / Σ ‖w_i‖⁴ over the cluster

    A feature belongs to the eigenspace that holds most of its norm, however little that is. R² is about the origin:
    the features of a regular geometry have equal norms, and R² about the mean would be 0/0.

    Args:
        W, rtol, rank_rtol: as in tight_frames.

    Returns:
        A ClusterFit for each eigenspace that holds a feature, largest eigenvalue first.

    Raises:
        TypeError, ValueError: as spectral_measure does.

    Source: Spectral superposition, Corollary 2 and Fig. 6.
    """
    spectrum = nonzero_spectrum("projective_linearity", W, rtol, rank_rtol)
    measures = features_of(spectrum)
    fits = []
    for index, (eigenvalue, dimension) in enumerate(zip(spectrum.eigenvalues, spectrum.multiplicities, strict=True)):
        features = torch.nonzero(measures.eigenspace == index)[:, 0]
        if len(features) == 0:
            continue
        value = float(eigenvalue)
        # In units of λ the line is D = x, and no square of a norm can leave float64's range.
        x, D = measures.squared_norm[features] / value, measures.dimensionality[features]
        slope = float((x * D).sum() / x.square().sum())
        fits.append(
            ClusterFit(
                features=features,
                eigenvalue=value,
                dimension=int(dimension),
                spread=_spread(spectrum.all_eigenvalues[spectrum.groups == index]),
                localization=float(measures.peak[features].mean()),
                slope=slope / value,
                r_squared=float(1 - (D - x).square().sum() / D.square().sum()),
                error=abs(slope - 1),
            )
        )
    return fits


def _spread(values: Tensor) -> float:
    return float(1 - values.min() / values.max())
