"""What else a patch touches: its spectrum, its place among the eigenspaces of the weights it edits, whom it moves.

A patch turns W x into W (1 + Δ) x. Features here are the rows w_i of W (the neurons that read x; those of a site's
modules together), as columns of Wᵀ [d, n]: they live where Δ acts, F = WᵀW is their frame operator, and the patch
moves each to (1 + Δ)ᵀ w_i. Δ's column space is what it writes into x, its row space what it reads from x. At the down
site W is down_proj and becomes W + Δ: the patch moves w_i by Δ's own row, and Δ writes into W's outputs beside W.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thought_kernels.models import describe
from thought_kernels.models.linear import is_linear, is_plain, is_transposed
from thought_kernels.models.sharded import gathered
from thought_kernels.ops.library import message
from thought_kernels.spectral.frames import check_matrix, frame_operator
from thought_kernels.spectral.overlap import Interference, Overlap, overlap
from thought_kernels.spectral.site_diagnosis import SiteDiagnosis, diagnose_site

MATRIX_SITES = ("attention", "mlp", "down")
_EPS = torch.finfo(torch.float32).eps
Key = tuple[int, str]


class _Edit(NamedTuple):
    """Δ in float64, and the share of its largest singular value below which others are rounding."""

    delta: Tensor
    resolution: float


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
            ``[d_out, d_in]`` or None. Vectors do not enter.
        model: a transformers model that ``thought_kernels.models.describe`` knows, with plain floating weights.
        other: another patch of the same model.

    Returns:
        A Diagnosis, all in float64 on the CPU.

    Raises:
        TypeError: a patch or a model of another kind.
        ValueError: a patch without a nonzero matrix, blocks the model lacks, another width, NaN, or weights that are
            quantised or zero.

    Source: Spectral superposition, §1 (what steering touches), eq. 3.1-3.3; gains and overlaps are ours.
    """
    ours, theirs = edits_of("diagnose", patch, "patch"), {} if other is None else edits_of("diagnose", other, "other")
    weights = weights_of("diagnose", model, [("patch", ours), ("other", theirs)])
    sites, shared = {}, {}
    for key, (delta, resolution) in ours.items():
        X = _features(weights[key])
        if key in theirs:
            shared[key] = overlap(delta, theirs[key].delta, _passed_on(key, X))
        sites[key] = diagnose_site(*key, delta, resolution, X, shared.get(key))
    if other is None:
        return Diagnosis(sites)
    found = _interference(shared, ours, theirs)
    return Diagnosis(sites, found.felt, found.caused)


def interference(patch: Any, others: Sequence[Any], model: Any) -> list[Interference]:
    """Predicts how far a patch and each of several others get in each other's way: diagnose's prediction alone.

    felt² = mean over the patch's sites of ‖W B Aᵀ‖² / ‖W A Aᵀ‖², A its own edits, B the other's; no W at down

    Args:
        patch, model: as diagnose takes them.
        others: patches of the same model; the weights are read once for all of them.

    Returns:
        An Interference for each.

    Raises:
        TypeError, ValueError: as diagnose does.

    Source: ours.
    """
    ours = edits_of("interference", patch, "patch")
    theirs = [edits_of("interference", other, "others") for other in others]
    weights = weights_of("interference", model, [("patch", ours), *(("others", edits) for edits in theirs)])
    shared: list[dict[Key, Overlap]] = [{} for _ in theirs]
    for key, edit in ours.items():
        F = _passed_on(key, _features(weights[key]))
        for found, edits in zip(shared, theirs, strict=True):
            if key in edits:
                found[key] = overlap(edit.delta, edits[key].delta, F)
    return [_interference(found, ours, edits) for found, edits in zip(shared, theirs, strict=True)]


def _interference(shared: Mapping[Key, Overlap], ours: Mapping[Key, Any], theirs: Mapping[Key, Any]) -> Interference:
    felt = sum(found.felt**2 for found in shared.values()) / len(ours)
    caused = sum(found.caused**2 for found in shared.values()) / len(theirs)
    return Interference(shared, felt**0.5, caused**0.5)


def edits_of(function: str, patch: Any, name: str) -> dict[Key, _Edit]:
    """A patch's nonzero matrices."""
    try:
        keys = [(layer, site) for layer in patch.layers for site in patch.sites if site in MATRIX_SITES]
        found = {key: patch.matrix(*key) for key in keys}
    except AttributeError as error:
        rule = "be a patch with layers, sites and matrix(layer, site)"
        raise TypeError(message(function, name, rule, type(patch).__name__)) from error
    edits = {}
    for key, delta in found.items():
        if delta is None:
            continue
        resolution = 4 * max(torch.finfo(delta.dtype).eps, _EPS)
        delta = delta.detach().to("cpu", torch.float64)
        if not bool(delta.isfinite().all()):
            raise ValueError(message(function, name, "be finite", "NaN or an infinity", _where(key)))
        if bool(delta.any()):
            edits[key] = _Edit(delta, resolution)
    if not edits:
        raise ValueError(message(function, name, "have a nonzero matrix", "none", "vectors have no spectrum"))
    return edits


def weights_of(function: str, model: Any, named: Sequence[tuple[str, Mapping[Key, _Edit]]]) -> dict[Key, list[Tensor]]:
    """The weights that edits multiply, after checking all edits, each with its argument's name, against the model."""
    decoder = describe(model)
    weights: dict[Key, list[Tensor]] = {}
    for name, edits in named:
        for key, edit in edits.items():
            if key not in weights:
                weights[key] = _weights_at(function, name, decoder, key)
            d_out, d_in = weights[key][0].shape
            shape = (d_out, d_in) if key[1] == "down" else (d_in, d_in)
            if tuple(edit.delta.shape) != shape:
                rule = f"have matrices of width {d_in}" if key[1] != "down" else f"have matrices {list(shape)}"
                raise ValueError(message(function, name, rule, list(edit.delta.shape), _where(key)))
    return weights


def _weights_at(function: str, name: str, decoder: Any, key: Key) -> list[Tensor]:
    layer, site = key
    last = len(decoder.blocks) - 1
    if not 0 <= layer <= last:
        raise ValueError(message(function, name, f"have blocks 0 to {last} only", layer, "which the model lacks"))
    block = decoder.blocks[layer]
    names: tuple[str, ...] = (block.parts.o_proj,)
    modules: tuple[Any, ...] = (block.o_proj,)
    if site == "mlp":
        names, modules = block.parts.mlp_inputs, block.mlp_inputs
    elif site == "down":
        names, modules = (block.parts.down_proj,), (block.down_proj,) if block.down_proj else ()
    if not modules:
        actual = "a mixture of experts"
        raise ValueError(message(function, "model", "have one MLP where the patch acts", actual, _where(key)))
    found = []
    for module_name, module in zip(names, modules, strict=True):
        weight = gathered(getattr(module, "weight", None))
        if not is_linear(module) or not is_plain(weight):
            kind = type(module)  # with its module, since packed and wrapped ones are called Linear too
            holds = "no weight"
            if isinstance(weight, Tensor):
                holds = f"{type(weight.data).__name__} of {weight.dtype}, {weight.device}"
            actual = f"{kind.__module__}.{kind.__qualname__} with {holds} at {module_name}"
            raise ValueError(message(function, "model", "have plain floating weights", actual, _where(key)))
        check_matrix(function, weight)
        found.append((weight.T if is_transposed(module) else weight).detach())
    if not any(bool(weight.any()) for weight in found):
        actual = f"zeros at {' and '.join(names)}"
        raise ValueError(message(function, "model", "have nonzero weights where the patch acts", actual, _where(key)))
    return found


def _features(weights: Sequence[Tensor]) -> Tensor:
    """W's rows as columns ``[d, n]``, float64."""
    return torch.cat([weight.to("cpu", torch.float64) for weight in weights]).T


def _passed_on(key: Key, X: Tensor) -> Tensor:
    """WᵀW, W being what the edit's output goes through: 1 at the down site, whose edit is of W's own output."""
    return torch.eye(X.shape[1], dtype=X.dtype) if key[1] == "down" else frame_operator(X)


def _where(key: tuple[int, str]) -> str:
    return f"block {key[0]}, site {key[1]!r}"
