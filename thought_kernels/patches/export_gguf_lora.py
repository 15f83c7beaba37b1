"""A patch as a GGUF LoRA adapter, with which llama.cpp serves it on the GGUF file of the same model.

llama.cpp adds (alpha / r) B A x to what a weight makes of x, with one alpha for all and each weight's own rank r. B is
written times r / alpha, so that every scale is 1 and no rank need be padded.

Source: llama.cpp, src/llama-adapter.cpp.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from thought_kernels.models import describe
from thought_kernels.ops.checks import as_path
from thought_kernels.patches.data import PatchData
from thought_kernels.patches.gguf_file import check_gguf, write_gguf
from thought_kernels.patches.lora import Accepted, Lora, LoraExport

# llama.cpp's name of a family, by config.model_type.
ARCHITECTURES = {
    "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3", "gemma3_text": "gemma3", "llama": "llama",
    "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe",
    "olmo2": "olmo2", "olmo3": "olmo2", "phi3": "phi3", "smollm3": "smollm3", "granite": "granite", "gpt2": "gpt2",
    "gpt_neox": "gptneox",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GgufLora(LoraExport):
    """What ``export_gguf_lora`` wrote; LoraExport's attributes too.

    Attributes:
        file: where.
    """

    file: Path

    @property
    def llama_cpp(self) -> str:
        """The flags with which llama.cpp serves the adapter."""
        return f"--lora {self.file}"


def export_gguf_lora(
    patch: PatchData, file: str | os.PathLike[str], model: Any, accepted: Accepted, *, progress: bool = False
) -> GgufLora:
    """Writes a GGUF LoRA adapter; ``ThoughtPatch.export_gguf_lora`` is the public form and says more.

    Args:
        patch: the patch.
        file: the file, whose folder is created.
        model: the model the adapter is for, best read from the GGUF file that it will be served on.
        accepted: which losses are accepted.
        progress: show a progress bar on stderr.
    """
    path = gguf_path("export_gguf_lora", file)
    model_type = _known_type(model)
    check_gguf("export_gguf_lora")
    instead = (
        "give drop=True (--drop) to leave it out; export_control_vector carries one that is a constant of a block's "
        "output"
    )
    lora = Lora("export_gguf_lora", patch, model, accepted, instead=instead, biases=False, progress=progress)
    alpha = float(max(lora.ranks.values()))
    write_gguf(
        "export_gguf_lora",
        path,
        ARCHITECTURES[model_type],
        {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha},
        dict(_named(lora, ARCHITECTURES[model_type], alpha)),
    )
    lora.log_losses()
    return GgufLora(file=path, ranks=lora.ranks, **lora.losses())


def gguf_path(function: str, file: str | os.PathLike[str]) -> Path:
    """The file as a path; raises ValueError for a folder, and for a name that llama.cpp's tools would not look for."""
    path = as_path(function, "file", file)
    if path.is_dir() or path.suffix != ".gguf":
        raise ValueError(f"{function}: file must be a file's path that ends in .gguf, got {path}")
    return path


def _known_type(model: Any) -> str:
    model_type = describe(model).model.config.model_type
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"export_gguf_lora: model must be of a type that llama.cpp has a name for, got {model_type!r}; known are "
            f"{', '.join(ARCHITECTURES)}"
        )
    return model_type


def _named(lora: Lora, architecture: str, alpha: float) -> Iterator[tuple[str, Tensor]]:
    """Tensors by llama.cpp's names."""
    import gguf

    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, 1 + max(layer for layer, _ in lora.carried))
    for name, factors in lora.factors.items():
        known = names.get_name(name.replace("language_model.", ""))
        if known is None:
            raise ValueError(
                f"export_gguf_lora: modules must have names that llama.cpp knows, got {name}; export_peft and "
                "llama.cpp's convert_lora_to_gguf.py may carry it"
            )
        a, b = factors.a, factors.b
        yield f"{known}.weight.lora_a", a if a.shape[0] else a.new_zeros(1, a.shape[1])
        yield f"{known}.weight.lora_b", b * (b.shape[1] / alpha) if b.shape[1] else b.new_zeros(b.shape[0], 1)
