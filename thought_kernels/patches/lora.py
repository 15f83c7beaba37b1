"""A patch as LoRA factors, module by module, and what of it they lose; the formats that hold them have files each.

LoRA adds B A x to W x, and a patch asks for W (1 + Δ) x. So Δ = U Vᵀ becomes A = Vᵀ and B = W U: the factors belong to
the one model whose weights W entered them. Modules that read the same input (gate_proj and up_proj) share A. The down
site's Δ is added to W itself, and B = U.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from thought_kernels.models import in_memory
from thought_kernels.models.linear import input_width, is_transposed, linear_weight
from thought_kernels.models.quantised import called_weight, dequantised
from thought_kernels.models.undisturbed import undisturbed
from thought_kernels.patches.data import PatchData
from thought_kernels.patches.site import SitePatch, is_finite
from thought_kernels.patches.vectors import Placed, placed

_ROWS_PER_CHUNK = 4096
_logger = logging.getLogger(__name__)


class Accepted(NamedTuple):
    """Which losses are accepted; every other is refused.

    Attributes:
        rank: largest rank, which cuts the singular values beyond it; None for each Δ's own.
        energy: share of ‖Δ‖_F² that is kept, site by site, in as few singular values as hold it; None for all.
        fold: vectors that no bias can hold become matrices, v āᵀ/‖ā‖².
        drop: vectors that have no other place are left out.
    """

    rank: int | None = None
    energy: float | None = None
    fold: bool = False
    drop: bool = False

    def check(self, function: str) -> None:
        """Raises ValueError for a rank or an energy that is none."""
        rank, energy = self.rank, self.energy
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1):
            raise ValueError(f"{function}: rank must be a positive integer or None, got {rank!r}")
        if energy is not None and (isinstance(energy, bool) or not isinstance(energy, Real) or not 0 < energy <= 1):
            raise ValueError(f"{function}: energy must be above 0 and at most 1, or None, got {energy!r}")


class Factors(NamedTuple):
    """What is added to one module's output: B A x + bias.

    Attributes:
        a: A ``[r, d_in]``.
        b: B ``[d_out, r]``.
        bias: ``[d_out]`` or None.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None


@dataclass(frozen=True, kw_only=True)
class LoraExport:
    """What was exported as LoRA, and what was lost.

    Attributes:
        ranks: LoRA rank per module name.
        entries: what the adapter does, as SitePatches per (block, site): the patch itself but for what was lost, a
            residual vector as the down site's.
        truncation: ‖Δ − Δ_r‖_F / ‖Δ‖_F per (block, site) that a rank cut.
        fold_residuals: per (block, site) whose vector was folded into Δ, the relative squared error of doing so on the
            fitted rows, None where it is unknown.
        dropped: (block, site) whose vector was left out.
    """

    ranks: Mapping[str, int]
    entries: Mapping[tuple[int, str], SitePatch] = field(repr=False)
    truncation: Mapping[tuple[int, str], float]
    fold_residuals: Mapping[tuple[int, str], float | None]
    dropped: tuple[tuple[int, str], ...]

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(self.ranks.values())

    @property
    def has_bias(self) -> bool:
        """Whether vectors are carried as LoRA biases, which peft reads and vLLM refuses."""
        return any(entry.vector is not None for entry in self.entries.values())

    @property
    def lossy(self) -> bool:
        """Whether the adapter does something else than the patch."""
        return bool(self.truncation or self.fold_residuals or self.dropped)


class Lora:
    """A patch as factors of one model's modules.

    Args:
        function: opens the sentences of refusal.
        patch: the patch.
        model: the model.
        accepted: which losses are accepted.
        instead: what else can be done with what the format cannot carry, ends those sentences.
        biases: whether the format has biases.
        progress: show a progress bar on stderr.

    Attributes:
        root: the model itself, without wrappers.
        factors: Factors by module name.
        carried, truncation, fold_residuals, dropped: entries, and as LoraExport's.

    Raises:
        ValueError: a bad rank or energy, a patch that does not fit the model, a loss that is not accepted, modules
            with two names, NaN, or nothing to carry.
    """

    def __init__(
        self,
        function: str,
        patch: PatchData,
        model: Any,
        accepted: Accepted,
        *,
        instead: str,
        biases: bool,
        progress: bool,
    ) -> None:
        accepted.check(function)
        self._decoder, self._function = in_memory(function, model), function
        self.root: Any = self._decoder.model
        self._names = {id(module): name for name, module in self.root.named_modules()}
        # All refusals come before the first decomposition.
        planned, self.dropped = placed(
            function, patch, model, instead=instead, fold=accepted.fold, drop=accepted.drop, biases=biases
        )
        _check_one_name(function, self.root, planned)
        self.factors: dict[str, Factors] = {}
        self.carried: dict[tuple[int, str], SitePatch] = {}
        self.truncation: dict[tuple[int, str], float] = {}
        self.fold_residuals: dict[tuple[int, str], float | None] = {}
        for part in tqdm(planned, desc="export", unit="site", disable=not progress, leave=False):
            self._add(part, accepted)
        if not self.factors:
            raise ValueError(
                f"{function}: patch must have a nonzero matrix, got none; there is nothing a LoRA could carry"
            )

    @property
    def ranks(self) -> dict[str, int]:
        """Each module's rank, at least 1."""
        return {name: max(1, factors.a.shape[0]) for name, factors in self.factors.items()}

    @property
    def has_bias(self) -> bool:
        """Whether any module has a bias."""
        return any(factors.bias is not None for factors in self.factors.values())

    def losses(self) -> dict[str, Any]:
        """LoraExport's fields but for the ranks."""
        return {
            "entries": self.carried, "truncation": self.truncation, "fold_residuals": self.fold_residuals,
            "dropped": self.dropped,
        }  # fmt: skip

    def log_losses(self) -> None:
        """Says what was folded, left out or cut."""
        for (layer, site), residual in self.fold_residuals.items():
            known = "unknown" if residual is None else f"{residual:.3g}"
            _logger.warning(
                "%s: block %d, site %r: vector folded into the matrix, relative squared error %s",
                self._function, layer, site, known,
            )  # fmt: skip
        for layer, site in self.dropped:
            _logger.warning("%s: block %d, site %r: vector left out", self._function, layer, site)
        for (layer, site), share in self.truncation.items():
            _logger.info("%s: block %d, site %r: truncated, relative error %.3g", self._function, layer, site, share)

    def _add(self, part: Placed, accepted: Accepted) -> None:
        key, entry, _, modules, folds = part
        whole = entry.to(dtype=torch.float64)
        bias = None if folds else whole.vector
        if folds:
            whole = whole.folded()
            self.fold_residuals[key] = entry.fit.fold_residual if entry.fit is not None else None
        left, right, lost = _decomposed(whole, entry, accepted)
        if not left.shape[1] and bias is None:
            return
        if not left.shape[1]:  # a vector alone, whose Δ has no width of its own
            right = right.new_zeros(input_width(modules[0]), 0)
        if lost:
            self.truncation[key] = lost
        self.carried[key] = SitePatch(factors=(left, right), vector=bias)
        for module in modules:
            weighed, name = None if key[1] == "down" else module, self._names[id(module)]
            self.factors[name] = self._factors(weighed, name, left, right, bias)

    def _factors(
        self, module: nn.Module | None, name: str, left: Tensor, right: Tensor, bias: Tensor | None
    ) -> Factors:
        """(Vᵀ, W U, W v), rounded once: to float64 for a float64 model and to float32 otherwise.

        W is the module's weight, 1 where there is no module.
        """
        kept = torch.float64 if self._decoder.dtype == torch.float64 else torch.float32
        columns = left if bias is None else torch.cat([left, bias.to(left)[:, None]], dim=1)
        product = (columns if module is None else self._times_weight(module, columns)).to("cpu", kept)
        if not is_finite(product):
            raise ValueError(
                f"{self._function}: {name} must have finite weights that fit {kept}, got NaN or an infinity"
            )
        extra = None if bias is None else product[:, -1].contiguous()
        return Factors(right.T.to("cpu", kept).contiguous(), product[:, : left.shape[1]].contiguous(), extra)

    def _times_weight(self, module: nn.Module, columns: Tensor) -> Tensor:
        """W times columns [d, k], in float64; modules that wrap others are asked for W themselves."""
        weight = _weight(module)
        if weight is None:
            with undisturbed(self.root):
                weight = called_weight(module, len(columns), self._decoder.dtype, self._decoder.device)
        columns = columns.to(weight.device)
        return torch.cat([chunk.double() @ columns for chunk in weight.split(_ROWS_PER_CHUNK)])


def _check_one_name(function: str, root: nn.Module, planned: list[Placed]) -> None:
    """Raises if a module has two names: an adapter is written for one of them, and peft would wrap only that one."""
    names: dict[int, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for part in planned:
        for module in part.modules:
            found = names[id(module)]
            if len(found) > 1:
                raise ValueError(
                    f"{function}: modules must not be shared, got {' and '.join(found)} as one; block {part.key[0]}, "
                    f"site {part.key[1]!r}: give each name a copy of its own, or use applied"
                )


def _decomposed(whole: SitePatch, stored: SitePatch, accepted: Accepted) -> tuple[Tensor, Tensor, float]:
    """(U diag(s), V) up to the accepted rank, and the relative norm of what was cut off.

    Singular values below the rounding of the stored numbers are no part of Δ: rounding d² numbers to a relative eps/2
    each adds singular values of about eps · ‖Δ‖_F / √d <= eps · s_max.
    """
    u, s, v = whole.svd()
    # Numbers coarser than float32 are taken at their word, since the patch at work in a model takes them so too.
    coarsest = max(torch.finfo(tensor.dtype).eps for tensor in stored.tensors().values())
    precision = min(coarsest, torch.finfo(torch.float32).eps)
    own = int((s > 4 * precision * s[:1]).sum()) if s.numel() else 0
    kept = own if accepted.rank is None else min(own, accepted.rank)
    if accepted.energy is not None and accepted.energy < 1 and own:
        shares = s[:own].square().cumsum(0) / s[:own].square().sum()
        # The last share may be 1 less a rounding.
        enough = int((shares < min(accepted.energy, float(shares[-1]))).sum()) + 1
        kept = min(kept, enough)
    total = float(torch.linalg.vector_norm(s))
    lost = float(torch.linalg.vector_norm(s[kept:own])) / total if kept < own else 0.0
    return u[:, :kept] * s[:kept], v[:, :kept].contiguous(), lost


def _weight(module: Any) -> Tensor | None:
    """W [d_out, d_in] of a linear module that holds it, quantised ones included; None of what wraps another module."""
    if type(module) is nn.Linear or is_transposed(module):
        weight = linear_weight(module)
        if type(weight.data) is Tensor and weight.is_floating_point() and not weight.is_meta:
            return weight.detach()
    return dequantised(module) if "weight" in module._parameters or callable(getattr(module, "weight", None)) else None
