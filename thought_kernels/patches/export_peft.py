"""A patch as a PEFT LoRA folder, which peft, transformers, vLLM and llama.cpp's converter read.

lora_alpha is the rank, module by module, so that every reader's scaling alpha / r is 1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from thought_kernels.models.linear import is_transposed
from thought_kernels.patches.card import shareable
from thought_kernels.patches.data import PatchData
from thought_kernels.patches.lora import Accepted, Factors, Lora, LoraExport
from thought_kernels.patches.storage import as_folder, replace_files
from thought_kernels.patches.vllm import VLLM_RANKS, obstacles

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class PeftFolder(LoraExport):
    """What ``export_peft`` wrote; LoraExport's attributes too.

    Attributes:
        folder: where.
        obstacles: why vLLM cannot load it, a clause each; none where it can.
    """

    folder: Path
    obstacles: tuple[str, ...]

    @property
    def vllm(self) -> str:
        """The flags with which vLLM serves the adapter, or a sentence that says why it cannot."""
        if self.obstacles:
            return f"vLLM cannot load it: {'; '.join(self.obstacles)}"
        return f"--enable-lora --max-lora-rank {next(known for known in VLLM_RANKS if known >= self.rank)}"


def export_peft(
    patch: PatchData,
    directory: str | os.PathLike[str],
    model: Any,
    accepted: Accepted,
    *,
    pad: bool = False,
    progress: bool = False,
) -> PeftFolder:
    """Writes a PEFT LoRA folder; ``ThoughtPatch.export_peft`` is the public form and says more.

    Args:
        patch: the patch.
        directory: the folder, created if it does not exist.
        model: the model the adapter is for.
        accepted: which losses are accepted.
        pad: whether modules of lower rank are padded with zeros to the largest.
        progress: show a progress bar on stderr.
    """
    folder = as_folder("export_peft", directory)
    instead = "keep the patch's own folder for it, or give drop=True (--drop) to leave it out"
    lora = Lora("export_peft", patch, model, accepted, instead=instead, biases=True, progress=progress)
    ranks = lora.ranks
    if pad:
        ranks = dict.fromkeys(ranks, max(ranks.values()))
    tensors = dict(_named(lora.factors, ranks, lora.has_bias))
    told = {"format": "pt", "thought_patch": json.dumps(shareable(patch.provenance), default=str, ensure_ascii=False)}
    config = _config(lora.root, ranks, lora.has_bias)
    replace_files(
        folder,
        {
            WEIGHT_FILE: safetensors.torch.save(tensors, metadata=told),
            CONFIG_FILE: json.dumps(config, indent=2).encode(),
        },
    )
    lora.log_losses()
    against = tuple(obstacles(config, tensors, lora.root.config.model_type))
    return PeftFolder(folder=folder, ranks=ranks, obstacles=against, **lora.losses())


def _named(factors: Mapping[str, Factors], ranks: Mapping[str, int], has_bias: bool) -> Iterator[tuple[str, Tensor]]:
    """Tensors by PEFT's names, padded with zeros to the ranks."""
    for name, (a, b, bias) in factors.items():
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
