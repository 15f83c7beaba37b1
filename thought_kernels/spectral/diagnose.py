"""What else a patch touches: its spectrum, its place among the eigenspaces of the weights it edits, whom it moves.

A patch turns W x into W (1 + Δ) x. Features here are the rows w_i of W (the neurons that read x; gate_proj's and
up_proj's together), as columns of Wᵀ [d, n]: they live where Δ acts, F = WᵀW is their frame operator, and the patch
moves each to (1 + Δ)ᵀ w_i. Δ's column space is what it writes into x, its row space what it reads from x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from thought_kernels.models import describe
from thought_kernels.ops.library import message
from thought_kernels.spectral.density import SpectralDensity
from thought_kernels.spectral.frames import check_matrix
from thought_kernels.spectral.measure import FeatureMeasures, features_of, shares
from thought_kernels.spectral.overlap import Overlap, overlap
from thought_kernels.spectral.spectrum import FrameSpectrum, decompose

MODULES = {"attention": ("o_proj",), "mlp": ("gate_proj", "up_proj")}
_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class FeatureChange:
    """What W -> W (1 + Δ) does to each row of W; tensors ``[n]`` float64, gate_proj's rows before up_proj's.

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
            "saturation": [float(m.dimensionality.sum() / m.leverage.sum()) for m in (self.before, self.after)],
            "mean_slack": [float(m.slack.mean()) for m in (self.before, self.after)],
            "mean_dimensionality_change": float(change.mean()),
            "mean_absolute_dimensionality_change": float(change.abs().mean()),
            "largest_dimensionality_change": float(change.abs().max()),
            "mean_moved": float(self.moved.mean()),
            "mean_transport": float(self.transport.mean()),
            "largest_transport": float(self.transport.max()),
            "most_transported": most,
        }


@dataclass(frozen=True, eq=False)
class SiteDiagnosis:
    """One block and site of a patch.

    Attributes:
        layer, site: 0-based block index, "attention" or "mlp".
        singular_values: of Δ ``[d]`` float64, largest first.
        rank: how many are above float32's rounding of the largest.
        stable_rank, effective_rank: of Δ; exp of the entropy of its squared singular values' shares.
        strength: ‖WΔ‖_F / ‖W‖_F.
        eigenvalues, multiplicities: of F's eigenspaces ``[E]``, largest first.
        write, read: the share of ‖Δ‖_F² that Δ writes into, and reads from, each eigenspace ``[E]``.
        write_kernel, read_kernel: the rest, in the kernel of F; what is written there has no effect.
        write_gain, read_gain: Σ share · λ_e over the mean of all d eigenvalues: above 1 where Δ writes into (reads
            from) directions that W amplifies more than the average one.
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
        """
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


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """The report of ``diagnose``; ``print`` shows a table.

    Attributes:
        sites: SiteDiagnosis per (block, site).
        felt: predicted interference: the root mean square over the patch's sites of Overlap.felt, 0 where the other
            patch does nothing; how much the other patch disturbs this one, over what this one does itself. None
            without another patch.
        caused: the same the other way round, over the other patch's sites.
    """

    sites: Mapping[tuple[int, str], SiteDiagnosis]
    felt: float | None = None
    caused: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {"felt": self.felt, "caused": self.caused, "sites": [site.to_dict() for site in self.sites.values()]}

    def __str__(self) -> str:
        head = ("block", "site", "rank", "stable", "effective", "‖WΔ‖/‖W‖", "write", "read", "|ΔD|", "transport")
        other = ("reads", "writes", "aligned", "felt", "caused") if self.felt is not None else ()
        lines = [[*head, *other]]
        for found in self.sites.values():
            figures = found.features.summary()
            cells = [str(found.layer), found.site, str(found.rank), *(
                f"{number:.3g}" for number in (
                    found.stable_rank, found.effective_rank, found.strength, found.write_gain, found.read_gain,
                    figures["mean_absolute_dimensionality_change"], figures["mean_transport"],
                )
            )]  # fmt: skip
            if other:
                values = () if found.overlap is None else asdict(found.overlap).values()
                cells += [f"{value:.3g}" for value in values] or ["–"] * len(other)
            lines.append(cells)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        legend = [
            "write, read: how much more than an average direction W amplifies what Δ writes into, or reads from",
            "|ΔD|, transport: mean over W's rows of the change of D and of the share of norm that changed eigenspace",
        ]
        if self.felt is not None:
            legend.append(f"predicted interference: felt {self.felt:.3g}, caused {self.caused:.3g}")
        return "\n".join([*table, *legend])


def diagnose(patch: Any, model: Any, *, other: Any = None) -> Diagnosis:
    """Says what a patch touches in a model, and with ``other`` how far two patches get in each other's way.

    Args:
        patch: a ThoughtPatch, or anything with ``layers``, ``sites`` and ``matrix(layer, site)`` that returns Δ
            ``[d, d]`` or None. Vectors do not enter.
        model: a transformers model that ``thought_kernels.models.describe`` knows, with plain floating weights.
        other: another patch of the same model.

    Returns:
        A Diagnosis, all in float64 on the CPU.

    Raises:
        TypeError: a patch or a model of another kind.
        ValueError: a patch without a nonzero matrix, blocks the model lacks, another width, NaN, or quantised weights.

    Source: Spectral superposition, §1 (what steering touches), eq. 3.1-3.3; gains and overlaps are ours.
    """
    ours, theirs = _matrices(patch, "patch"), {} if other is None else _matrices(other, "other")
    decoder = describe(model)
    weights: dict[tuple[int, str], list[Tensor]] = {}
    for name, deltas in (("patch", ours), ("other", theirs)):
        for key, delta in deltas.items():
            if key not in weights:
                weights[key] = _weights(name, decoder, key)
            width = weights[key][0].shape[1]
            if tuple(delta.shape) != (width, width):
                raise ValueError(
                    message("diagnose", name, f"have matrices of width {width}", list(delta.shape), _where(key))
                )
    sites = {}
    shared: dict[tuple[int, str], Overlap] = {}
    for key, delta in ours.items():
        sites[key] = _site(key, delta, theirs.get(key), torch.cat([w.double().cpu() for w in weights[key]]).T)
        found = sites[key].overlap
        if found is not None:
            shared[key] = found
    if other is None:
        return Diagnosis(sites)
    felt = sum(found.felt**2 for found in shared.values()) / len(ours)
    caused = sum(found.caused**2 for found in shared.values()) / len(theirs)
    return Diagnosis(sites, felt**0.5, caused**0.5)


def _site(key: tuple[int, str], delta: Tensor, other: Tensor | None, X: Tensor) -> SiteDiagnosis:
    spectrum = decompose("diagnose", X)
    u, s, vh = torch.linalg.svd(delta)
    density = SpectralDensity(s.square(), int((s > 4 * _EPS * s[0]).sum()))
    basis = spectrum.frame_basis
    total = s.square().sum()
    write, read = ((basis.T @ side).square() @ s.square() / total for side in (u, vh.T))
    # Eigenvalues as they are in the matrix that was decomposed: a W that was rescaled cancels from every ratio.
    mean = float(spectrum.all_eigenvalues.sum()) / len(s)
    gains = [float(profile @ spectrum.all_eigenvalues) / mean for profile in (write, read)]
    F = (basis * spectrum.all_eigenvalues) @ basis.T
    return SiteDiagnosis(
        *key, s, density.rank, density.stable_rank, density.effective_rank,
        strength=(gains[0] * float(total) / len(s)) ** 0.5,
        eigenvalues=spectrum.eigenvalues, multiplicities=spectrum.multiplicities,
        write=spectrum.sum_groups(write), read=spectrum.sum_groups(read),
        write_kernel=max(0.0, 1 - float(write.sum())), read_kernel=max(0.0, 1 - float(read.sum())),
        write_gain=gains[0], read_gain=gains[1], features=_change(spectrum, delta),
        overlap=None if other is None else overlap(delta, other, F),
    )  # fmt: skip


def _change(spectrum: FrameSpectrum, delta: Tensor) -> FeatureChange:
    X, basis = spectrum.matrix, spectrum.frame_basis
    edited = X + delta.T @ X
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


def _matrices(patch: Any, name: str) -> dict[tuple[int, str], Tensor]:
    try:
        keys = [(layer, site) for layer in patch.layers for site in patch.sites if site in MODULES]
        found = {key: patch.matrix(*key) for key in keys}
    except AttributeError as error:
        rule = "be a patch with layers, sites and matrix(layer, site)"
        raise TypeError(message("diagnose", name, rule, type(patch).__name__)) from error
    deltas = {}
    for key, delta in found.items():
        if delta is None:
            continue
        delta = delta.detach().to("cpu", torch.float64)
        if not bool(delta.isfinite().all()):
            raise ValueError(message("diagnose", name, "be finite", "NaN or an infinity", _where(key)))
        if bool(delta.any()):
            deltas[key] = delta
    if not deltas:
        raise ValueError(message("diagnose", name, "have a nonzero matrix", "none", "vectors have no spectrum"))
    return deltas


def _weights(name: str, decoder: Any, key: tuple[int, str]) -> list[Tensor]:
    layer, site = key
    if layer >= len(decoder.blocks):
        last = len(decoder.blocks) - 1
        raise ValueError(message("diagnose", name, f"have blocks 0 to {last} only", layer, "which the model lacks"))
    found = []
    for module_name in MODULES[site]:
        module = getattr(decoder.blocks[layer], module_name)
        weight = getattr(module, "weight", None)
        plain = isinstance(module, nn.Linear) and weight is not None and type(weight.data) is Tensor
        if weight is None or not plain or not weight.is_floating_point() or weight.is_meta:
            actual = f"{type(module).__name__} at {module_name}"
            raise ValueError(message("diagnose", "model", "have plain floating weights", actual, _where(key)))
        check_matrix("diagnose", weight)
        found.append(weight.detach())
    return found


def _where(key: tuple[int, str]) -> str:
    return f"block {key[0]}, site {key[1]!r}"
