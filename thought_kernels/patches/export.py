"""A patch as a PEFT LoRA folder, which peft, transformers, vLLM and llama.cpp's converter read.

LoRA adds B A x to W x, and a patch asks for W (1 + Δ) x. So Δ = U Vᵀ becomes A = Vᵀ and B = W U: the adapter belongs to
the one model whose weights W entered it. Modules that read the same input (gate_proj and up_proj) share A. The down
site's Δ is added to W itself, and B = U. lora_alpha is the rank, module by module, so that every reader's scaling
alpha / r is 1.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from thought_kernels.models import describe, in_memory
from thought_kernels.models.linear import input_width, is_transposed, linear_weight
from thought_kernels.models.undisturbed import undisturbed
from thought_kernels.patches.data import PatchData
from thought_kernels.patches.site import SitePatch, is_finite
from thought_kernels.patches.storage import as_folder, replace_files
from thought_kernels.patches.vectors import Placed, placed

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILE = "adapter_model.safetensors"
# What vLLM's --max-lora-rank accepts; its default is 16.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_ROWS_PER_CHUNK = 4096
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PeftFolder:
    """What ``export_peft`` wrote.

    Attributes:
        folder: where.
        ranks: LoRA rank per module name.
        entries: what the adapter does, as SitePatches per (block, site): the patch itself but for what was lost, a
            residual vector as the down site's.
        truncation: ‖Δ − Δ_r‖_F / ‖Δ‖_F per (block, site) that ``rank`` cut.
        fold_residuals: per (block, site) whose vector was folded into Δ, the relative squared error of doing so on the
            fitted rows, None where it is unknown.
        has_bias: whether vectors are carried as LoRA biases, which peft reads and vLLM refuses.
    """

    folder: Path
    ranks: Mapping[str, int]
    entries: Mapping[tuple[int, str], SitePatch] = field(repr=False)
    truncation: Mapping[tuple[int, str], float]
    fold_residuals: Mapping[tuple[int, str], float | None]
    has_bias: bool

    @property
    def rank(self) -> int:
        """The largest rank of a module, ``r`` of the adapter's configuration."""
        return max(self.ranks.values())

    @property
    def lossy(self) -> bool:
        """Whether the adapter does something else than the patch."""
        return bool(self.truncation or self.fold_residuals)

    @property
    def vllm(self) -> str:
        """The flags with which vLLM serves the adapter, or a sentence that says why it cannot."""
        if self.has_bias:
            return "vLLM cannot load it: it carries vectors as LoRA biases; fold them instead"
        flag = next((known for known in VLLM_RANKS if known >= self.rank), None)
        if flag is None:
            return f"vLLM cannot load it: its rank {self.rank} is above {VLLM_RANKS[-1]}; truncate it"
        return f"--enable-lora --max-lora-rank {flag}"


def export_peft(
    patch: PatchData,
    directory: str | os.PathLike[str],
    model: Any,
    *,
    rank: int | None = None,
    fold: bool = False,
    pad: bool = False,
    progress: bool = False,
) -> PeftFolder:
    """Writes a PEFT LoRA folder; ``ThoughtPatch.export_peft`` is the public form and says more.

    Args:
        patch: the patch.
        directory: the folder, created if it does not exist.
        model: the model the adapter is for.
        rank: largest rank, None for each Δ's own.
        fold: whether vectors may be folded into matrices.
        pad: whether modules of lower rank are padded with zeros to the largest.
        progress: show a progress bar on stderr.
    """
    folder = as_folder("export_peft", directory)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1):
        raise ValueError(f"export_peft: rank must be a positive integer or None, got {rank!r}")
    root: nn.Module = in_memory("export_peft", model).model
    # All refusals come before the first decomposition.
    planned = placed("export_peft", patch, model, fold=fold, instead="keep the patch's own folder for it")
    for part in planned:
        _check_weights(part)
    _check_one_name(root, planned)
    adapter = _Adapter(root, describe(model).dtype)
    for part in tqdm(planned, desc="export", unit="site", disable=not progress, leave=False):
        adapter.add(part, rank)
    if not adapter.tensors:
        raise ValueError("export_peft: patch must have a nonzero matrix, got none; there is nothing a LoRA could carry")
    ranks = {name: max(1, a.shape[0]) for name, (a, _, _) in adapter.tensors.items()}
    if pad:
        ranks = dict.fromkeys(ranks, max(ranks.values()))
    has_bias = any(bias is not None for _, _, bias in adapter.tensors.values())
    payload = safetensors.torch.save(
        dict(_named(adapter.tensors, ranks, has_bias)),
        metadata={"format": "pt", "thought_patch": json.dumps(patch.provenance, default=str, ensure_ascii=False)},
    )
    config = _config(root, ranks, has_bias)
    replace_files(folder, {WEIGHT_FILE: payload, CONFIG_FILE: json.dumps(config, indent=2).encode()})
    adapter.log_losses()
    return PeftFolder(folder, ranks, adapter.carried, adapter.truncation, adapter.fold_residuals, has_bias)


def _check_weights(part: Placed) -> None:
    """Raises unless what B = W U is made of are weights: such modules quantise what they multiply, U too."""
    for module, name in zip(part.modules, part.names, strict=True):
        if part.key[1] != "down" and next(module.parameters(), None) is None:
            raise ValueError(
                f"export_peft: {name} must have weights as parameters, got "
                f"{type(module).__module__}.{type(module).__name__}; block {part.key[0]}, site {part.key[1]!r}: export "
                "for the model before it was quantised"
            )


def _check_one_name(root: nn.Module, planned: list[Placed]) -> None:
    """Raises if a module has two names: an adapter is written for one of them, and peft would wrap only that one."""
    names: dict[int, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for part in planned:
        for module in part.modules:
            found = names[id(module)]
            if len(found) > 1:
                raise ValueError(
                    f"export_peft: modules must not be shared, got {' and '.join(found)} as one; block {part.key[0]}, "
                    f"site {part.key[1]!r}: give each name a copy of its own, or use applied"
                )


class _Adapter:
    """What is written, module by module, and what of the patch was lost.

    Attributes:
        tensors: (A, B, bias of B) per module name.
        carried, truncation, fold_residuals: as PeftFolder's.
    """

    def __init__(self, root: nn.Module, dtype: torch.dtype) -> None:
        self._names = {id(module): name for name, module in root.named_modules()}
        self._dtype = dtype
        self.tensors: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        self.carried: dict[tuple[int, str], SitePatch] = {}
        self.truncation: dict[tuple[int, str], float] = {}
        self.fold_residuals: dict[tuple[int, str], float | None] = {}

    def add(self, part: Placed, rank: int | None) -> None:
        key, entry, _, modules, folds = part
        whole = entry.to(dtype=torch.float64)
        bias = None if folds else whole.vector
        if folds:
            whole = whole.folded()
            self.fold_residuals[key] = entry.fit.fold_residual if entry.fit is not None else None
        left, right, lost = _factors(whole, entry, rank)
        if not left.shape[1] and bias is None:
            return
        if not left.shape[1]:  # a vector alone, whose Δ has no width of its own
            right = right.new_zeros(input_width(modules[0]), 0)
        if lost:
            self.truncation[key] = lost
        self.carried[key] = SitePatch(factors=(left, right), vector=bias)
        for module in modules:
            weighed, name = None if key[1] == "down" else module, self._names[id(module)]
            self.tensors[name] = _lora(weighed, name, left, right, bias, self._dtype)

    def log_losses(self) -> None:
        for (layer, site), residual in self.fold_residuals.items():
            known = "unknown" if residual is None else f"{residual:.3g}"
            _logger.warning(
                "export_peft: block %d, site %r: vector folded into the matrix, relative squared error %s",
                layer, site, known,
            )  # fmt: skip
        for (layer, site), share in self.truncation.items():
            _logger.info("export_peft: block %d, site %r: truncated, relative error %.3g", layer, site, share)


def _factors(whole: SitePatch, stored: SitePatch, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """(U diag(s), V) up to the rank, and the relative norm of what the rank cut off.

    Singular values below the rounding of the stored numbers are no part of Δ: rounding d² numbers to a relative eps/2
    each adds singular values of about eps · ‖Δ‖_F / √d <= eps · s_max.
    """
    u, s, v = whole.svd()
    # Numbers coarser than float32 are taken at their word, since the patch at work in a model takes them so too.
    coarsest = max(torch.finfo(tensor.dtype).eps for tensor in stored.tensors().values())
    precision = min(coarsest, torch.finfo(torch.float32).eps)
    own = int((s > 4 * precision * s[:1]).sum()) if s.numel() else 0
    kept = own if rank is None else min(own, rank)
    total = float(torch.linalg.vector_norm(s))
    lost = float(torch.linalg.vector_norm(s[kept:own])) / total if kept < own else 0.0
    return u[:, :kept] * s[:kept], v[:, :kept].contiguous(), lost


def _lora(
    module: nn.Module | None, name: str, left: Tensor, right: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(A, B, bias of B) = (Vᵀ, W U, W v), rounded once: to float64 for a float64 model and to float32 otherwise.

    W is the module's weight, 1 where there is no module.
    """
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    columns = left if bias is None else torch.cat([left, bias.to(left)[:, None]], dim=1)
    product = (columns if module is None else _times_weight(module, columns, dtype)).to("cpu", kept)
    if not is_finite(product):
        raise ValueError(f"export_peft: {name} must have finite weights that fit {kept}, got NaN or an infinity")
    extra = None if bias is None else product[:, -1].contiguous()
    return right.T.to("cpu", kept).contiguous(), product[:, : left.shape[1]].contiguous(), extra


@torch.no_grad()
def _times_weight(module: nn.Module, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """W times columns [d, k], in float64 for plain weights; other modules (quantised, wrapped) are asked themselves."""
    weight = linear_weight(module) if type(module) is nn.Linear or is_transposed(module) else None
    if weight is not None and weight.is_floating_point() and not weight.is_meta:
        columns = columns.to(weight.device)
        rows = [chunk.double() @ columns for chunk in weight.detach().split(_ROWS_PER_CHUNK)]
        return torch.cat(rows)
    device = next(module.parameters()).device
    inputs = columns.T.to(device, dtype)
    with undisturbed(module):
        return (module(inputs) - module(torch.zeros_like(inputs[:1]))).T.double()


def _named(
    tensors: Mapping[str, tuple[Tensor, Tensor, Tensor | None]], ranks: Mapping[str, int], has_bias: bool
) -> Iterator[tuple[str, Tensor]]:
    """Tensors by PEFT's names, padded with zeros to the ranks."""
    for name, (a, b, bias) in tensors.items():
        missing = ranks[name] - a.shape[0]
        prefix = f"base_model.model.{name}"
        # A copy for each module: safetensors refuses the A that gate_proj and up_proj share.
        yield f"{prefix}.lora_A.weight", nn.functional.pad(a, (0, 0, 0, missing)).clone()
        yield f"{prefix}.lora_B.weight", nn.functional.pad(b, (0, missing)).contiguous()
        if has_bias:
            yield f"{prefix}.lora_B.bias", b.new_zeros(b.shape[0]) if bias is None else bias


def _config(root: nn.Module, ranks: Mapping[str, int], has_bias: bool) -> dict[str, Any]:
    """What PEFT reads beside the tensors."""
    transposed = any(is_transposed(module) for name, module in root.named_modules() if name in ranks)
    largest = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(root, "config", None), "_name_or_path", "") or None,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "lora_bias": has_bias,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
