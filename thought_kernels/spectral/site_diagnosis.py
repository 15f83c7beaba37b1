"""One block and site of a patch: Δ's spectrum, its place among the eigenspaces of W, what becomes of W's features."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from thought_kernels.ops.library import message
from thought_kernels.spectral.density import SpectralDensity
from thought_kernels.spectral.measure import FeatureMeasures, features_of, shares
from thought_kernels.spectral.overlap import Overlap
from thought_kernels.spectral.spectrum import FrameSpectrum, decompose


@dataclass(frozen=True, eq=False)
class FeatureChange:
    """What W -> W (1 + Δ), at down W + Δ, does to each row of W; tensors ``[n]`` float64, a site's modules in order.

    Attributes:
        before, after: the features' measures in their own frame, before and after.
        moved: ‖w'_i − w_i‖ / ‖w_i‖; 0 for a zero feature.
        transport: the part of a feature's norm that changed eigenspace: total variation, in [0, 1], between its
            spectral measure and that of w'_i over the old eigenspaces and the kernel of F.
    """

    before: FeatureMeasures
    after: FeatureMeasures
    moved: Tensor
    transport: Tensor

    @property
    def dimensionality_change(self) -> Tensor:
        """D'_i − D_i ``[n]``."""
        return self.after.dimensionality - self.before.dimensionality

    def summary(self) -> dict[str, Any]:
        """Means and extremes, JSON values only."""
        change = self.dimensionality_change
        most = self.transport.topk(min(5, len(self.transport))).indices.tolist()
        return {
            "features": len(change),
            "saturation": [_saturation(self.before), _saturation(self.after)],
            "mean_slack": [float(m.slack.mean()) for m in (self.before, self.after)],
            "mean_dimensionality_change": float(change.mean()),
            "mean_absolute_dimensionality_change": float(change.abs().mean()),
            "largest_dimensionality_change": float(change.abs().max()),
            "mean_moved": float(self.moved.mean()),
            "mean_transport": float(self.transport.mean()),
            "largest_transport": float(self.transport.max()),
            "most_transported": most,
        }


def _saturation(measures: FeatureMeasures) -> float:
    """Σ D_i / rank, the rank being Σ ℓ_i; 0 where the edit has left nothing."""
    return float(measures.dimensionality.sum() / measures.leverage.sum()) if bool(measures.leverage.any()) else 0.0


@dataclass(frozen=True, eq=False)
class SiteDiagnosis:
    """One block and site of a patch.

    Attributes:
        layer, site: 0-based block index, "attention", "mlp" or "down".
        singular_values: of Δ ``[min(d_out, d_in)]`` float64, largest first.
        rank: how many are above the rounding, in Δ's dtype and at least float32's, of the largest.
        stable_rank, effective_rank: of Δ; exp of the entropy of its squared singular values' shares.
        strength: ‖WΔ‖_F / ‖W‖_F; ‖Δ‖_F / ‖W‖_F at down, where Δ is added to W.
        eigenvalues, multiplicities: of F's eigenspaces ``[E]``, largest first.
        write, read: the share of ‖Δ‖_F² that Δ writes into, and reads from, each eigenspace ``[E]``; at down it writes
            into those of WWᵀ, which have the same eigenvalues.
        write_kernel, read_kernel: the rest, in the kernel of F; what is written there has no effect.
        write_gain, read_gain: Σ share · λ_e over the mean of all d eigenvalues: above 1 where Δ writes into (reads
            from) directions that W amplifies more than the average one; at down, that W too writes into (reads from).
        features: FeatureChange.
        overlap: with the other patch, None where there is none or it does nothing here.
    """

    layer: int
    site: str
    singular_values: Tensor = field(repr=False)
    rank: int
    stable_rank: float
    effective_rank: float
    strength: float
    eigenvalues: Tensor = field(repr=False)
    multiplicities: Tensor = field(repr=False)
    write: Tensor = field(repr=False)
    read: Tensor = field(repr=False)
    write_kernel: float
    read_kernel: float
    write_gain: float
    read_gain: float
    features: FeatureChange = field(repr=False)
    overlap: Overlap | None = None

    def top_share(self, part: str, dimensions: float = 0.1) -> float:
        """The share that Δ writes into, or reads from, F's leading eigenspaces.

        Args:
            part: "write" or "read".
            dimensions: of how much of the space, in (0, 1]; the last eigenspace counts in proportion.

        Raises:
            ValueError: another part or a number outside.
        """
        if part not in ("write", "read"):
            raise ValueError(message("top_share", "part", "be 'write' or 'read'", repr(part)))
        if not 0 < dimensions <= 1:
            raise ValueError(message("top_share", "dimensions", "be in (0, 1]", dimensions))
        profile, wanted = getattr(self, part), dimensions * len(self.singular_values)
        filled = self.multiplicities.cumsum(0).double()
        used = ((wanted - (filled - self.multiplicities)) / self.multiplicities).clamp(0, 1)
        return float((profile * used).sum())

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; of the features a summary."""
        tensors = ("singular_values", "eigenvalues", "multiplicities", "write", "read")
        plain = ("layer", "site", "rank", "stable_rank", "effective_rank", "strength", "write_kernel", "read_kernel",
                 "write_gain", "read_gain")  # fmt: skip
        return {
            **{name: getattr(self, name) for name in plain},
            "write_top_tenth": self.top_share("write"),
            "read_top_tenth": self.top_share("read"),
            **{name: getattr(self, name).tolist() for name in tensors},
            "features": self.features.summary(),
            "overlap": None if self.overlap is None else asdict(self.overlap),
        }


def diagnose_site(
    layer: int, site: str, delta: Tensor, resolution: float, X: Tensor, found: Overlap | None
) -> SiteDiagnosis:
    """The diagnosis of one matrix.

    Args:
        layer, site: of the result.
        delta: Δ ``[d_out, d_in]`` float64, nonzero; both widths are W's d_in but at down.
        resolution: singular values up to this share of the largest are Δ's own rounding.
        X: the rows of W as columns ``[d, n]`` float64, not all zero.
        found: overlap with another patch, None for none.
    """
    spectrum = decompose("diagnose", X)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    density = SpectralDensity(s.square(), int((s > 0).sum()))
    written = spectrum.gram_basis if site == "down" else spectrum.frame_basis
    total = s.square().sum()
    write, read = (
        (basis.T @ side).square() @ s.square() / total for basis, side in ((written, u), (spectrum.frame_basis, vh.T))
    )
    # Eigenvalues as they are in the matrix that was decomposed: a W that was rescaled cancels from every ratio.
    power = float(spectrum.all_eigenvalues.sum())
    gains = [float(p @ spectrum.all_eigenvalues) * d / power for p, d in zip((write, read), delta.shape, strict=True)]
    strength = (gains[0] * float(total) / len(s)) ** 0.5
    if site == "down":
        strength = (float(total) / power) ** 0.5 * 2.0**-spectrum.exponent
    return SiteDiagnosis(
        layer, site, s, int((s > resolution * s[0]).sum()), density.stable_rank, density.effective_rank,
        strength=strength, eigenvalues=spectrum.eigenvalues, multiplicities=spectrum.multiplicities,
        write=spectrum.sum_groups(write), read=spectrum.sum_groups(read),
        write_kernel=max(0.0, 1 - float(write.sum())), read_kernel=max(0.0, 1 - float(read.sum())),
        write_gain=gains[0], read_gain=gains[1], features=_change(spectrum, delta, site), overlap=found,
    )  # fmt: skip


def _change(spectrum: FrameSpectrum, delta: Tensor, site: str) -> FeatureChange:
    X, basis = spectrum.matrix, spectrum.frame_basis
    edited = X + (delta.T * 2.0**-spectrum.exponent if site == "down" else delta.T @ X)
    moved, transport = [], []
    for columns, old in spectrum.coefficients():
        p, squared_norm = shares(old)
        new = edited[:, columns].T
        whole = new.square().sum(1)
        q = (new @ basis).square() / torch.where(whole > 0, whole, 1)[:, None]
        outside = (1 - q.sum(1)).clamp(min=0)
        distance = (spectrum.sum_groups(q) - spectrum.sum_groups(p)).abs().sum(1) + outside
        present = (squared_norm > 0) & (whole > 0)
        transport.append(torch.where(present, distance / 2, 0).clamp(max=1))
        step = torch.linalg.vector_norm(new - X[:, columns].T, dim=1)
        moved.append(torch.where(squared_norm > 0, step / torch.where(squared_norm > 0, squared_norm, 1).sqrt(), 0))
    after = features_of(decompose("diagnose", edited))
    return FeatureChange(features_of(spectrum), after, torch.cat(moved), torch.cat(transport))
