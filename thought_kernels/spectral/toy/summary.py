"""What the spectrum of one trained toy model says, as a row of numbers and one row for each cluster of features."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from thought_kernels.spectral.clusters import frame_residual, projective_linearity
from thought_kernels.spectral.measure import nonzero_spectrum
from thought_kernels.spectral.taxonomy import classes_of

# Eigenvalues of a trained toy model scatter: what one exact optimum would have as a multiple eigenvalue is spread over
# a few per cent by the noise of the last batches. An eigenspace is a window of this width in all.
RTOL = 0.02
# A cluster this near to a tight frame of its eigenspace counts as one. Of all clusters of the untrained models of
# docs/toy_models.md the nearest has a residual of 0.28; a tenth of the trained ones' lie below 0.09 to 0.16.
TIGHT = 0.1


@dataclass(frozen=True)
class ModelSummary:
    """One trained model.

    Attributes:
        rank: of W.
        dimensionality: Σ_i D_i, at most the rank.
        saturation: Σ_i D_i / rank.
        represented: features with ‖w_i‖² above a quarter of the largest.
        eigenspaces: of positive eigenvalues, grouped.
        spread: (λ_max − λ_min) / λ_max within an eigenspace, mean over represented features.
        localization: mean of max_e p_ie over represented features.
        residual: mean over represented features of CV_i, whose eigenspaces are not grouped.
        r_squared: mean over clusters of R² of D = ‖w‖²/λ, each cluster weighed by its features.
        slope_error: mean over clusters of |kλ − 1|, likewise.
        band: share of represented features whose measure lies within 10 % of a mean eigenvalue, localized or not.
        tight: share of represented features in clusters whose frame residual is at most TIGHT.
        held_001, held_01: the leverage that features of slack of at least τ = 0.01, 0.1 hold, as a share of the rank;
            at most (1 − saturation) / τ (Theorem 9).
    """

    rank: int
    dimensionality: float
    saturation: float
    represented: int
    eigenspaces: int
    spread: float
    localization: float
    residual: float
    r_squared: float
    slope_error: float
    band: float
    tight: float
    held_001: float
    held_01: float


def summarize(W: Tensor, *, rtol: float = RTOL) -> tuple[ModelSummary, list[dict[str, Any]]]:
    """A trained model's summary, and its clusters as Fig. 6 plots them.

    Args:
        W: [m, n], finite and not all zero.
        rtol: eigenvalues within this times the largest of one another form one eigenspace.

    Returns:
        The summary, and for each cluster its eigenvalue, dimension, spread of eigenvalues, number of members, their
        residual from a tight frame, localization, slope error and R². The features of a cluster are the represented
        ones: columns that training has brought to almost nothing have directions of chance.

    Raises:
        ValueError: as spectral_measure does.

    Source: SS §4.1, Fig. 5 and 6.
    """
    spectrum = nonzero_spectrum("summarize", W, rtol, None)
    classes = classes_of(spectrum)
    measures = classes.measures
    kept = represented(W)
    total = float(measures.dimensionality.sum())
    clusters = []
    for fit in projective_linearity(W, rtol=rtol):
        index = int(measures.eigenspace[fit.features[0]])
        members = fit.features[kept[fit.features]]
        if len(members) == 0:
            continue
        x, D = measures.squared_norm[members] / fit.eigenvalue, measures.dimensionality[members]
        clusters.append(
            {
                "eigenvalue": fit.eigenvalue,
                "dimension": fit.dimension,
                "spread": fit.spread,
                "members": len(members),
                "residual": frame_residual(spectrum, members, index),
                "localization": float(measures.peak[members].mean()),
                "slope_error": abs(float((x * D).sum() / x.square().sum()) - 1),
                "r_squared": float(1 - (D - x).square().sum() / D.square().sum()),
            }
        )
    sizes = torch.tensor([float(cluster["members"]) for cluster in clusters], dtype=torch.float64)

    def mean(name: str) -> float:
        values = torch.tensor([cluster[name] for cluster in clusters], dtype=torch.float64)
        return float((values * sizes).sum() / sizes.sum())

    summary = ModelSummary(
        rank=spectrum.rank,
        dimensionality=total,
        saturation=total / spectrum.rank,
        represented=int(kept.sum()),
        eigenspaces=len(spectrum.eigenvalues),
        spread=mean("spread"),
        localization=float(measures.peak[kept].mean()),
        residual=float(measures.residual[kept].mean()),
        r_squared=mean("r_squared"),
        slope_error=mean("slope_error"),
        band=float(((classes.codes == 0) | (classes.codes == 1))[kept].double().mean()),
        tight=float(sizes[torch.tensor([cluster["residual"] <= TIGHT for cluster in clusters])].sum() / sizes.sum()),
        held_001=classes.residue(0.01)[0],
        held_01=classes.residue(0.1)[0],
    )
    return summary, clusters


def represented(W: Tensor) -> Tensor:
    """Which features training has kept, ``[n]`` bool: those with ‖w_i‖² above a quarter of the largest."""
    squared_norm = W.double().square().sum(0)
    return squared_norm > 0.25 * squared_norm.max()


def as_row(summary: ModelSummary) -> dict[str, Any]:
    """The summary's fields, floats to six significant digits, so that a table says no more than rounding leaves."""
    return {name: rounded(value) for name, value in asdict(summary).items()}


def rounded(value: Any) -> Any:
    """A float to six significant digits; anything else as it is."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
