"""The spectral measure of each feature, and what follows from it: leverage, slack, saturation, residual, support.

With p_ie the share of feature i's squared norm in eigenspace e, μ_i = Σ_e p_ie δ(λ_e) is a probability measure on F's
positive spectrum. Everything here is float64 and streams over blocks of features, except spectral_measure itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from thought_kernels.ops.checks import check_number
from thought_kernels.ops.library import message
from thought_kernels.spectral.frames import check_matrix, column_blocks, frame_operator, in_range, triangle
from thought_kernels.spectral.spectrum import RTOL, FrameSpectrum, decompose

SUPPORT_MASS = 1e-12  # rounding leaves about 1e-24 in eigenspaces a feature has no part in


class SpectralMeasure(NamedTuple):
    """The spectral measures of all features; float64.

    Attributes:
        eigenvalues: the distinct positive λ_e ``[E]``, largest first.
        weights: p_ie ``[n, E]``; rows sum to 1, those of zero features are 0.
        multiplicities: dimension of each eigenspace ``[E]``, int64.
    """

    eigenvalues: Tensor
    weights: Tensor
    multiplicities: Tensor


class FeatureMeasures(NamedTuple):
    """Scalars of each feature ``[n]``, float64; all 0 for a zero feature.

    Attributes:
        squared_norm: ‖w_i‖².
        rayleigh: κ_i = E_μ[λ].
        dimensionality: D_i = ‖w_i‖² / κ_i.
        leverage: ℓ_i = ‖w_i‖² E_μ[1/λ].
        slack: σ_i = 1 − 1 / (E_μ[λ] E_μ[1/λ]).
        residual: CV_i = √Var_μ(λ) / κ_i.
        lower, upper: λ⁻_i and λ⁺_i, the ends of μ_i's support.
        half_width: ω_i = (λ⁺ − λ⁻) / (λ⁺ + λ⁻), so that σ_i ≤ ω_i².
        peak: max_e p_ie, over grouped eigenspaces.
        eigenspace: the e of that maximum, int64; −1 for a zero feature.
    """

    squared_norm: Tensor
    rayleigh: Tensor
    dimensionality: Tensor
    leverage: Tensor
    slack: Tensor
    residual: Tensor
    lower: Tensor
    upper: Tensor
    half_width: Tensor
    peak: Tensor
    eigenspace: Tensor


def spectral_measure(W: Tensor, *, rtol: float = RTOL, rank_rtol: float | None = None) -> SpectralMeasure:
    """How each feature spreads its norm over the eigenspaces of the frame operator.

    p_ie = ‖P_e w_i‖² / ‖w_i‖²,  μ_i = Σ_e p_ie δ(λ_e)

    Args:
        W: ``[m, n]``, features in columns; float64, float32, bfloat16 or float16, finite and not all zero.
        rtol: eigenvalues within ``rtol`` times the largest of one another are one.
        rank_rtol: singular values up to this times the largest count as zero; max(m, n) · eps of W's dtype by default.

    Returns:
        eigenvalues ``[E]`` (largest first), weights ``[n, E]``, multiplicities ``[E]``.

    Raises:
        TypeError, ValueError: as frame_operator does; W is all zero; a tolerance outside [0, 1).

    Source: Spectral superposition, eq. 3.3, Lemma B.11.
    """
    spectrum = nonzero_spectrum("spectral_measure", W, rtol, rank_rtol)
    return measure_of(spectrum)


def measure_of(spectrum: FrameSpectrum) -> SpectralMeasure:
    """spectral_measure of a W that is decomposed already."""
    weights = torch.cat([spectrum.sum_groups(shares(block)[0]) for _, block in spectrum.coefficients()])
    return SpectralMeasure(spectrum.eigenvalues, weights, spectrum.multiplicities)


def measure_features(W: Tensor, *, rtol: float = RTOL, rank_rtol: float | None = None) -> FeatureMeasures:
    """All scalar measures of every feature in one pass: two products of size m² n in float64.

    Norms are taken within the range of F as the rank tolerance sees it, so that D_i ≤ ℓ_i and Σ D_i ≤ rank hold for
    every W; a feature that lies outside it counts as zero.

    Args:
        W, rtol, rank_rtol: as in spectral_measure.

    Returns:
        FeatureMeasures, each ``[n]``.

    Raises:
        TypeError, ValueError: as spectral_measure does.

    Source: Spectral superposition, Lemma B.12, Theorems 8, 10 and 11.
    """
    return features_of(nonzero_spectrum("measure_features", W, rtol, rank_rtol))


def features_of(spectrum: FrameSpectrum) -> FeatureMeasures:
    """measure_features of a W that is decomposed already, which may be zero here."""
    n, device = spectrum.matrix.shape[1], spectrum.matrix.device
    dtypes = [torch.int64 if name == "eigenspace" else torch.float64 for name in FeatureMeasures._fields]
    if spectrum.rank == 0:
        nothing = FeatureMeasures(*(torch.zeros(n, dtype=dtype, device=device) for dtype in dtypes))
        return nothing._replace(eigenspace=nothing.eigenspace - 1)
    # Allocated beforehand: small results kept between the blocks' large temporaries fragment the heap by gigabytes.
    measures = FeatureMeasures(*(torch.empty(n, dtype=dtype, device=device) for dtype in dtypes))
    for columns, coefficients in spectrum.coefficients():
        for whole, part in zip(measures, _measure_block(spectrum, coefficients), strict=True):
            whole[columns] = part
    scaled = ("squared_norm", "rayleigh", "lower", "upper")
    return measures._replace(**{name: spectrum.unscale(getattr(measures, name)) for name in scaled})


def leverage(W: Tensor, *, rank_rtol: float | None = None) -> Tensor:
    """The leverage score of each feature: how much of W's rank would go with it.

    ℓ_i = w_iᵀ F⁺ w_i = ‖w_i‖² Σ_e p_ie / λ_e,  Σ_i ℓ_i = rank W

    Args:
        W: ``[m, n]``, features in columns; float64, float32, bfloat16 or float16, finite.
        rank_rtol: as in spectral_measure.

    Returns:
        ``[n]`` float64 in [0, 1]; 0 for a zero feature.

    Raises:
        TypeError, ValueError: as frame_operator does; a tolerance outside [0, 1).

    Source: Spectral superposition, proof of Theorem 1, Theorem 8(1).
    """
    spectrum = decompose("leverage", W, rank_rtol=rank_rtol)
    roots = spectrum.all_eigenvalues.sqrt()
    return torch.cat([(block / roots).square().sum(1) for _, block in spectrum.coefficients()])


def slack(W: Tensor, *, rank_rtol: float | None = None) -> Tensor:
    """How far each feature stays below its capacity bound; zero exactly for eigenvectors of F.

    σ_i = 1 − D_i / ℓ_i = 1 − 1 / (E_μ[λ] E_μ[1/λ])

    Args:
        W: ``[m, n]``, features in columns, finite and not all zero.
        rank_rtol: as in spectral_measure.

    Returns:
        ``[n]`` float64 in [0, 1]; 0 for a zero feature, which has neither dimensions nor leverage.

    Raises:
        TypeError, ValueError: as spectral_measure does.

    Source: Spectral superposition, Theorem 8.
    """
    return features_of(nonzero_spectrum("slack", W, RTOL, rank_rtol)).slack


def saturation(W: Tensor, *, rank_rtol: float | None = None) -> float:
    """The share of W's rank that its features use up; 1 exactly if every spectral measure is a single atom.

    Σ_i D_i / rank W ≤ 1

    Zero features count with D = 0. That trained toy models come close to 1 is an empirical finding, not a theorem.

    Args:
        W: ``[m, n]``, features in columns, finite and not all zero.
        rank_rtol: as in spectral_measure.

    Returns:
        A number in (0, 1], to rounding.

    Raises:
        TypeError, ValueError: as spectral_measure does.

    Source: Spectral superposition, Theorem 1 and §4.1.
    """
    spectrum = nonzero_spectrum("saturation", W, RTOL, rank_rtol)
    return float(features_of(spectrum).dimensionality.sum()) / spectrum.rank


def spectral_moment(W: Tensor, order: int, *, rank_rtol: float | None = None) -> Tensor:
    """A moment of each feature's spectral measure.

    E_μ[λ^r] = w_iᵀ F^r w_i / ‖w_i‖²,  with F⁺ for r = −1

    Args:
        W: ``[m, n]``, features in columns, finite and not all zero.
        order: r, any integer; negative ones are powers of F⁺.
        rank_rtol: as in spectral_measure.

    Returns:
        ``[n]`` float64; 0 for a zero feature.

    Raises:
        TypeError, ValueError: as spectral_measure does; ``order`` is not an integer.

    Source: Spectral superposition, Lemma B.12.
    """
    if isinstance(order, bool) or not isinstance(order, int):
        raise TypeError(message("spectral_moment", "order", "be an integer", type(order).__name__))
    spectrum = nonzero_spectrum("spectral_moment", W, RTOL, rank_rtol)
    powers = spectrum.all_eigenvalues**order
    moments = torch.cat([shares(block)[0] @ powers for _, block in spectrum.coefficients()])
    return spectrum.unscale(moments, order)


def rayleigh_quotient(W: Tensor, *, rank_rtol: float | None = None) -> Tensor:
    """The mean of each feature's spectral measure.

    κ_i = w_iᵀ F w_i / ‖w_i‖² = E_μ[λ],  D_i = ‖w_i‖² / κ_i

    Args:
        W: ``[m, n]``, features in columns, finite and not all zero.
        rank_rtol: as in spectral_measure.

    Returns:
        ``[n]`` float64; 0 for a zero feature.

    Raises:
        TypeError, ValueError: as spectral_measure does.

    Source: Spectral superposition, Lemma B.10, Corollary 7.
    """
    return features_of(nonzero_spectrum("rayleigh_quotient", W, RTOL, rank_rtol)).rayleigh


def eigenvector_residual(W: Tensor) -> Tensor:
    """How far each feature is from being an eigenvector of F, by one product with F and no eigenvalues.

    CV_i = ‖F w_i − κ_i w_i‖ / (κ_i ‖w_i‖) = √Var_μ(λ) / E_μ[λ]

    Where the support is narrow (ω ≪ 1), σ_i ≈ CV_i². A small CV_i alone bounds nothing: little norm at a small
    eigenvalue hardly moves it, and has a large 1/λ, hence slack.

    Args:
        W: ``[m, n]``, features in columns; float64, float32, bfloat16 or float16, finite and not all zero.

    Returns:
        ``[n]`` float64; 0 for a zero feature.

    Raises:
        TypeError, ValueError: as frame_operator does; W is all zero.

    Source: Spectral superposition, Theorem 10.
    """
    largest = check_matrix("eigenvector_residual", W)
    if largest == 0:
        raise ValueError(rank_zero("eigenvector_residual"))
    W, _ = in_range(W.detach(), largest, torch.float64)
    if W.shape[0] > W.shape[1]:
        W = triangle(W.T).T  # the same Gram matrix in n dimensions, and F is [n, n]
    F = frame_operator(W, dtype=torch.float64)
    F /= F.diagonal().max()
    residuals = []
    for columns in column_blocks(W):
        w = W[:, columns].double()
        norm = torch.linalg.vector_norm(w, dim=0)
        w = w / torch.where(norm > 0, norm, 1)
        image = F @ w
        rayleigh = (w * image).sum(0)
        distance = torch.linalg.vector_norm(image - rayleigh * w, dim=0)
        residuals.append(distance / torch.where(norm > 0, rayleigh, 1))
    return torch.cat(residuals)


def support_bounds(
    W: Tensor, *, mass: float = SUPPORT_MASS, rank_rtol: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The ends of each spectral measure's support, and its relative half-width, which bounds the slack.

    ω_i = (λ⁺_i − λ⁻_i) / (λ⁺_i + λ⁻_i),  σ_i ≤ ω_i² (+ 2 mass)

    λ⁻ is the smallest eigenvalue below which lies at most ``mass`` of E_μ[1/λ], and λ⁺ the largest above which lies at
    most ``mass`` of E_μ[λ]: what rounding leaves in the other eigenspaces does not count, and the bound stays true.

    Args:
        W: ``[m, n]``, features in columns, finite and not all zero.
        mass: in [0, 0.5).
        rank_rtol: as in spectral_measure.

    Returns:
        λ⁻ ``[n]``, λ⁺ ``[n]``, ω ``[n]``, float64; 0 for zero features.

    Raises:
        TypeError, ValueError: as spectral_measure does; a mass outside [0, 0.5).

    Source: Spectral superposition, Theorem 11.
    """
    check_mass("support_bounds", mass)
    spectrum = nonzero_spectrum("support_bounds", W, RTOL, rank_rtol)
    eigenvalues, parts = spectrum.all_eigenvalues, []
    for _, block in spectrum.coefficients():
        p, _ = shares(block)
        parts.append(torch.stack(support(eigenvalues, p / eigenvalues, p * eigenvalues, mass)))
    lower, upper = torch.cat(parts, 1)
    return spectrum.unscale(lower), spectrum.unscale(upper), relative_half_width(lower, upper)


def check_mass(function: str, mass: float) -> None:
    """Raises unless the mass that may lie outside a support is a number in [0, 0.5)."""
    check_number(function, "mass", mass, or_zero=True)
    if mass >= 0.5:
        raise ValueError(message(function, "mass", "be less than 0.5", mass))


def nonzero_spectrum(function: str, W: Tensor, rtol: float, rank_rtol: float | None) -> FrameSpectrum:
    """The spectrum of a W that has one."""
    spectrum = decompose(function, W, rtol, rank_rtol)
    if spectrum.rank == 0:
        raise ValueError(rank_zero(function))
    return spectrum


def rank_zero(function: str, name: str = "W") -> str:
    """What is said of a matrix that is zero."""
    fix = "without a nonzero feature there is no spectrum"
    return message(function, name, "have rank at least 1", "rank 0", fix)


def shares(coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """p ``[features, r]`` per eigenvector, from u_eᵀ w_i, and ‖w_i‖² ``[features]``; p = 0 for a zero feature."""
    norm = torch.linalg.vector_norm(coefficients, dim=1)
    p = (coefficients / torch.where(norm > 0, norm, 1)[:, None]).square()
    return p, norm.square()


def support(eigenvalues: Tensor, low_mass: Tensor, high_mass: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """λ⁻ and λ⁺ ``[features]``: at most ``mass`` of low_mass ``[features, r]`` lies below, and of high_mass above."""
    # Eigenvalues descend. Counted from an end, atoms are outside while their running sum is within the mass allowed.
    above = (high_mass.cumsum(1) <= mass * high_mass.sum(1, keepdim=True)).sum(1)
    below = (low_mass.flip(1).cumsum(1) <= mass * low_mass.sum(1, keepdim=True)).sum(1)
    last = len(eigenvalues) - 1
    upper = eigenvalues[above.clamp(max=last)]
    lower = eigenvalues[(last - below).clamp(min=0)]
    empty = high_mass.sum(1) == 0
    return torch.where(empty, 0, torch.minimum(lower, upper)), torch.where(empty, 0, upper)


def relative_half_width(lower: Tensor, upper: Tensor) -> Tensor:
    """(λ⁺ − λ⁻) / (λ⁺ + λ⁻), and 0 where both are 0."""
    total = upper + lower
    return torch.where(total > 0, (upper - lower) / torch.where(total > 0, total, 1), 0)


def _measure_block(spectrum: FrameSpectrum, coefficients: Tensor) -> FeatureMeasures:
    eigenvalues = spectrum.all_eigenvalues
    p, squared_norm = shares(coefficients)
    nonzero = squared_norm > 0
    rayleigh, inverse = p @ eigenvalues, p @ (1 / eigenvalues)
    safe_rayleigh = torch.where(nonzero, rayleigh, 1)
    # The difference form: E[λ²] − κ² would lose what a nearly localized feature has.
    variance = (p * (eigenvalues - rayleigh[:, None]).square()).sum(1)
    product = torch.where(nonzero, rayleigh * inverse, 1)
    lower, upper = support(eigenvalues, p / eigenvalues, p * eigenvalues, SUPPORT_MASS)
    peak, eigenspace = spectrum.sum_groups(p).max(1)
    return FeatureMeasures(
        squared_norm,
        rayleigh,
        squared_norm / safe_rayleigh,
        squared_norm * inverse,
        (1 - 1 / product).clamp(0, 1),
        variance.sqrt() / safe_rayleigh,
        lower,
        upper,
        relative_half_width(lower, upper),
        peak,
        torch.where(nonzero, eigenspace, -1),
    )
