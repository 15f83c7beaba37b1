"""A patch in the weights of an ordinary Hugging Face checkpoint, which transformers' AutoModel and all else read."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thought_kernels.models import in_memory
from thought_kernels.patches.card import shareable
from thought_kernels.patches.data import PatchData
from thought_kernels.patches.merge import MergedPatch
from thought_kernels.patches.storage import as_folder, to_disk

PROVENANCE_FILE = "thought_patch_provenance.json"


@dataclass(frozen=True)
class MergedFolder:
    """What ``export_merged`` wrote.

    Attributes:
        folder: where.
        shards: how many files hold the weights.
        fold_residuals: per (block, site) whose vector was folded into Δ, the relative squared error of doing so on the
            fitted rows, None where it is unknown.
        dropped: (block, site) whose vector was left out.
    """

    folder: Path
    shards: int
    fold_residuals: Mapping[tuple[int, str], float | None]
    dropped: tuple[tuple[int, str], ...]

    @property
    def lossy(self) -> bool:
        """Whether the weights do something else than the patch, but for their rounding."""
        return bool(self.fold_residuals or self.dropped)


def export_merged(
    patch: PatchData,
    directory: str | os.PathLike[str],
    model: Any,
    tokenizer: Any,
    *,
    fold: bool = False,
    drop: bool = False,
    max_shard_size: str | int = "5GB",
) -> MergedFolder:
    """Writes a merged checkpoint; ``ThoughtPatch.export_merged`` is the public form and says more.

    Args:
        patch: the patch.
        directory: a folder that is empty or not there.
        model: the model, which is as it was afterwards.
        tokenizer: saved beside it.
        fold: whether vectors may be folded into matrices.
        drop: whether vectors may be left out.
        max_shard_size: as transformers takes it.
    """
    folder = as_folder("export_merged", directory).resolve()  # "." has no name of its own
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"export_merged: directory must be empty or not there, got {folder}, which holds files; a checkpoint's "
            "shards would mix with them"
        )
    root: Any = in_memory("export_merged", model).model
    _check_plain(root)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        with MergedPatch(
            patch, model, fold=fold, drop=drop, backup_device=None, function="export_merged",
            instead="give drop=True (--drop) to leave it out",
        ) as merged:  # fmt: skip
            root.save_pretrained(partial, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        told = json.dumps(shareable(patch.provenance), indent=2, ensure_ascii=False, default=str)
        (partial / PROVENANCE_FILE).write_text(told, encoding="utf-8")
        for file in filter(Path.is_file, partial.rglob("*")):
            to_disk(file)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shards = len(list(folder.glob("*.safetensors")))
    return MergedFolder(folder, shards, merged.fold_residuals, merged.dropped)


def _check_plain(root: Any) -> None:
    """Raises for a model that save_pretrained would write with adapters, or in a quantised layout."""
    quantised = getattr(root.config, "quantization_config", None)
    if quantised is not None:
        raise ValueError(
            "export_merged: model must have plain floating weights, got a quantised one; load the weights that it was "
            "made of, or a GGUF file, whose weights are unpacked"
        )
    if getattr(root, "_hf_peft_config_loaded", False):
        raise ValueError("export_merged: model must be without adapters, got one with them; unload or merge them first")
