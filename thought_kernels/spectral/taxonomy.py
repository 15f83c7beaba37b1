"""Three kinds of features, by how widely their spectral measures spread, and the budget they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from thought_kernels.ops.checks import check_number
from thought_kernels.ops.library import message
from thought_kernels.spectral.measure import (
    FeatureMeasures,
    check_mass,
    features_of,
    nonzero_spectrum,
    relative_half_width,
    shares,
    support,
)
from thought_kernels.spectral.spectrum import RTOL, FrameSpectrum

CLASSES = ("localized", "band-localized", "broadband", "zero")
LOCALIZED, BAND, MASS = 1e-6, 0.1, 1e-3  # default thresholds of classify_features


@dataclass(frozen=True, eq=False)
class FeatureClasses:
    """The class of every feature, and the capacity budget of Theorems 8 and 9. A sequence of n class names.

    Attributes:
        codes: index into CLASSES for each feature ``[n]``, int64.
        measures: FeatureMeasures; ``measures.half_width`` is Theorem 11's ω, with σ ≤ ω².
        band_half_width: ω of the band that holds all but ``mass`` of E_μ[λ] and E_μ[1/λ] ``[n]``, which decides the
            class; σ ≤ ω² + mass.
        rank: r of W.
    """

    codes: Tensor
    measures: FeatureMeasures
    band_half_width: Tensor
    rank: int

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> str:
        return CLASSES[int(self.codes[index])]

    def __iter__(self) -> Iterator[str]:
        return (CLASSES[code] for code in self.codes.tolist())

    @property
    def counts(self) -> dict[str, int]:
        """Features in each class; zero features are one of them, so the counts sum to n."""
        counted = torch.bincount(self.codes, minlength=len(CLASSES)).tolist()
        return dict(zip(CLASSES, counted, strict=True))

    @property
    def shares(self) -> dict[str, float]:
        """Each class's share of the features."""
        return {name: count / len(self) for name, count in self.counts.items()}

    @property
    def leverage_shares(self) -> dict[str, float]:
        """Each class's share of the rank: Σ ℓ_i / r over its features; sums to 1."""
        return {
            name: float(self.measures.leverage[self.codes == code].sum()) / self.rank
            for code, name in enumerate(CLASSES)
        }

    @property
    def defect(self) -> float:
        """r − Σ D_i = Σ ℓ_i σ_i, by the right-hand side, which does not cancel (Theorem 8)."""
        return float((self.measures.leverage * self.measures.slack).sum())

    @property
    def epsilon(self) -> float:
        """ε with Σ D_i = (1 − ε) r; the saturation is 1 − ε."""
        return self.defect / self.rank

    def residue(self, tau: float) -> tuple[float, float]:
        """The leverage that features of much slack hold, and Theorem 9's bound on it.

        (1/r) Σ_{σ_i ≥ τ} ℓ_i ≤ ε / τ

        Args:
            tau: τ in (0, 1).

        Returns:
            The share of the rank that features with σ_i ≥ τ hold, and ε/τ.

        Raises:
            TypeError, ValueError: τ is not a number in (0, 1).

        Source: Spectral superposition, Theorem 9.
        """
        check_number("residue", "tau", tau, positive=True)
        if tau >= 1:
            raise ValueError(message("residue", "tau", "be less than 1", tau))
        held = self.measures.leverage[self.measures.slack >= tau].sum()
        return float(held) / self.rank, self.epsilon / tau

    def __repr__(self) -> str:
        counted = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        return f"FeatureClasses({counted}; rank {self.rank}, saturation {1 - self.epsilon:.4f})"


def classify_features(
    W: Tensor,
    *,
    localized: float = LOCALIZED,
    band: float = BAND,
    mass: float = MASS,
    rtol: float = RTOL,
    rank_rtol: float | None = None,
) -> FeatureClasses:
    """Sorts features by how widely their norm spreads over the spectrum of F.

    ======================  ==========================================================================
    "localized"             σ_i ≤ ``localized``: one eigenspace, w_i is an eigenvector of F
    "band-localized"        ω_i ≤ ``band``, hence σ_i ≤ band² + mass: several, of nearly equal eigenvalue
    "broadband"             all others
    "zero"                  w_i = 0, or outside W's range as the rank tolerance sees it
    ======================  ==========================================================================

    The paper's classes are σ = 0, ω ≪ 1 and ω = Θ(1); the thresholds are ours. Of a trained matrix every feature has
    some norm everywhere, so ω_i is taken of a band: below it lies at most mass/2 of E_μ[1/λ], above it at most mass/2
    of E_μ[λ]. So what lies outside is weighed as it enters the slack, and Theorem 11 holds for the band: with the outer
    atoms at its ends, E_μ[λ] E_μ[1/λ] ≤ 1/((1 − ω²)(1 − mass/2)²), and σ_i ≤ ω_i² + mass.

    Args:
        W: ``[m, n]``, features in columns; float64, float32, bfloat16 or float16, finite and not all zero.
        localized: largest slack of a localized feature, in [0, 1).
        band: largest relative half-width of a band-localized feature, in [0, 1).
        mass: the share of E_μ[1/λ] below and of E_μ[λ] above that may lie outside a band, in all, in [0, 0.5).
        rtol: eigenvalues within ``rtol`` times the largest of one another are one.
        rank_rtol: singular values up to this times the largest count as zero; max(m, n) · eps of W's dtype by default.

    Returns:
        FeatureClasses.

    Raises:
        TypeError, ValueError: as spectral_measure does; a threshold outside its interval.

    Source: Spectral superposition, Theorem 12, with Theorems 8, 9 and 11.
    """
    for name, value in (("localized", localized), ("band", band)):
        check_number("classify_features", name, value, or_zero=True)
        if value >= 1:
            raise ValueError(message("classify_features", name, "be less than 1", value))
    check_mass("classify_features", mass)
    return classes_of(nonzero_spectrum("classify_features", W, rtol, rank_rtol), localized, band, mass)


def classes_of(
    spectrum: FrameSpectrum, localized: float = LOCALIZED, band: float = BAND, mass: float = MASS
) -> FeatureClasses:
    """classify_features of a W that is decomposed already, with thresholds that were checked."""
    measures = features_of(spectrum)
    band_half_width = torch.empty_like(measures.slack)
    for columns, block in spectrum.coefficients():
        p, _ = shares(block)
        low, high = p / spectrum.all_eigenvalues, p * spectrum.all_eigenvalues
        band_half_width[columns] = relative_half_width(*support(spectrum.all_eigenvalues, low, high, mass / 2))
    codes = torch.full_like(measures.eigenspace, 2)
    codes[band_half_width <= band] = 1
    codes[measures.slack <= localized] = 0
    codes[measures.eigenspace < 0] = 3
    return FeatureClasses(codes, measures, band_half_width, spectrum.rank)
