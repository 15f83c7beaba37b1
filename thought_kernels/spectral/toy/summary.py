"""What the spectrum of one trained toy model says, as a row of numbers and one row for each cluster of features."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from thought_kernels.spectral.clusters import projective_linearity
from thought_kernels.spectral.measure import nonzero_spectrum
from thought_kernels.spectral.taxonomy import classes_of

# Eigenvalues of a trained toy model scatter: what one exact optimum would have as a multiple eigenvalue is spread over
# a few per cent by the noise of the last batches.
RTOL = 0.02


@dataclass(frozen=True)
class ModelSummary:
    """One trained model.

    Attributes:
        rank: of W.
        dimensionality: Σ_i D_i, at most the rank.
        saturation: Σ_i D_i / rank.
        represented: features with ‖w_i‖² above a quarter of the largest.
        eigenspaces: of positive eigenvalues, grouped.
        localization: mean of max_e p_ie over represented features.
        residual: mean over represented features of CV_i, whose eigenspaces are not grouped.
        r_squared: mean over clusters of R² of D = ‖w‖²/λ, each cluster weighed by its features.
        slope_error: mean over clusters of |kλ − 1|, likewise.
        band: share of represented features whose measure lies within 10 % of a mean eigenvalue, localized or not.
    """

    rank: int
    dimensionality: float
    saturation: float
    represented: int
    eigenspaces: int
    localization: float
    residual: float
    r_squared: float
    slope_error: float
    band: float


def summarize(W: Tensor, *, rtol: float = RTOL) -> tuple[ModelSummary, list[dict[str, Any]]]:
    """A trained model's summary, and its clusters as Fig. 6 plots them.

    Args:
        W: [m, n], finite and not all zero.
        rtol: eigenvalues within this times the largest of one another form one eigenspace.

    Returns:
        The summary, and for each cluster its eigenvalue, dimension, number of members, localization, slope error and
        R². The features of a cluster are the represented ones: columns that training has brought to almost nothing
        have directions of chance.

    Raises:
        ValueError: as spectral_measure does.

    Source: SS §4.1, Fig. 5 and 6.
    """
    spectrum = nonzero_spectrum("summarize", W, rtol, None)
    classes = classes_of(spectrum)
    measures = classes.measures
    kept = measures.squared_norm > 0.25 * measures.squared_norm.max()
    total = float(measures.dimensionality.sum())
    clusters = []
    for fit in projective_linearity(W, rtol=rtol):
        members = fit.features[kept[fit.features]]
        if len(members) == 0:
            continue
        x, D = measures.squared_norm[members] / fit.eigenvalue, measures.dimensionality[members]
        clusters.append(
            {
                "eigenvalue": fit.eigenvalue,
                "dimension": fit.dimension,
                "members": len(members),
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
        localization=float(measures.peak[kept].mean()),
        residual=float(measures.residual[kept].mean()),
        r_squared=mean("r_squared"),
        slope_error=mean("slope_error"),
        band=float(((classes.codes == 0) | (classes.codes == 1))[kept].double().mean()),
    )
    return summary, clusters


def as_row(summary: ModelSummary) -> dict[str, Any]:
    """The summary's fields, floats to six significant digits, so that a table says no more than rounding leaves."""
    return {name: rounded(value) for name, value in asdict(summary).items()}


def rounded(value: Any) -> Any:
    """A float to six significant digits; anything else as it is."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
