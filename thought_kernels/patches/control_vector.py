"""A patch's constants as a GGUF control vector, and such files as patches: repeng and llama.cpp write and read them.

``direction.k`` is added to the output of block k, 0-based: the residual site's vector. A vector at the down site is one
too, where nothing but the residual multiplier stands behind down_proj. llama.cpp has none at block 0.

Source: llama.cpp, src/llama-adapter.cpp and common/common.cpp; repeng, repeng/extract.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thought_kernels.models import describe
from thought_kernels.ops.checks import as_path
from thought_kernels.patches.apply import targets
from thought_kernels.patches.data import PatchData
from thought_kernels.patches.export_gguf_lora import ARCHITECTURES, gguf_path
from thought_kernels.patches.gguf_file import Damaged, GgufContent, read_gguf, write_gguf
from thought_kernels.patches.site import SitePatch, is_finite
from thought_kernels.patches.vectors import obstacle_behind_down

_ARCHITECTURE = "controlvector"
_NAME = re.compile(r"direction\.(0|[1-9][0-9]{0,4})")


@dataclass(frozen=True)
class ControlVector:
    """What ``export_control_vector`` wrote.

    Attributes:
        file: where.
        entries: what the control vector does, as SitePatches per (block, "residual").
        dropped: (block, site) whose matrix or vector was left out.
    """

    file: Path
    entries: Mapping[tuple[int, str], SitePatch] = field(repr=False)
    dropped: tuple[tuple[int, str], ...]

    @property
    def lossy(self) -> bool:
        """Whether the control vector does something else than the patch."""
        return bool(self.dropped)

    @property
    def llama_cpp(self) -> str:
        """The flags with which llama.cpp serves it."""
        return f"--control-vector {self.file}"


def export_control_vector(
    patch: PatchData, file: str | os.PathLike[str], model: Any, *, drop: bool = False
) -> ControlVector:
    """Writes a GGUF control vector; ``ThoughtPatch.export_control_vector`` is the public form and says more.

    Args:
        patch: the patch.
        file: the file, whose folder is created.
        model: the model that the patch is for.
        drop: whether matrices may be left out, and vectors that are no constant of a block's output.
    """
    function = "export_control_vector"
    path = gguf_path(function, file)
    vectors: dict[int, Tensor] = {}
    dropped: list[tuple[int, str]] = []
    for key, entry, block in targets(function, patch, model):
        lost = _lost(key, entry, block)
        if lost and not drop:
            raise ValueError(
                f"{function}: patch must hold nothing but constants of blocks' outputs, got {lost}; block {key[0]}, "
                f"site {key[1]!r}: export matrices by export_gguf_lora, or give drop=True (--drop) to leave it out "
                "and measure what that costs"
            )
        if lost:
            dropped.append(key)
        if entry.vector is not None and entry.vector.any() and not _vector_lost(key, block):
            multiplier = block.residual_multiplier if key[1] == "down" else 1.0
            added = entry.vector.to("cpu", torch.float64) * multiplier
            vectors[key[0]] = vectors.get(key[0], torch.zeros_like(added)) + added
    if not vectors:
        raise ValueError(f"{function}: patch must have a nonzero vector that a control vector can carry, got none")
    model_type = str(describe(model).model.config.model_type)
    write_gguf(
        function,
        path,
        _ARCHITECTURE,
        {
            f"{_ARCHITECTURE}.model_hint": ARCHITECTURES.get(model_type, model_type),
            f"{_ARCHITECTURE}.layer_count": len(vectors),
        },
        {f"direction.{layer}": vector for layer, vector in vectors.items()},
    )
    entries = {(layer, "residual"): SitePatch(vector=vector.float()) for layer, vector in vectors.items()}
    return ControlVector(path, entries, tuple(dropped))


def _lost(key: tuple[int, str], entry: SitePatch, block: Any) -> str:
    """What of an entry no control vector can carry, empty for nothing."""
    if entry.norm():
        return "a matrix"
    return _vector_lost(key, block) if entry.vector is not None and entry.vector.any() else ""


def _vector_lost(key: tuple[int, str], block: Any) -> str:
    """Why an entry's vector cannot be carried, empty where it can."""
    layer, site = key
    if site in ("attention", "mlp"):
        return "a vector inside the block"
    obstacle = obstacle_behind_down(block) if site == "down" else ""
    if obstacle:
        return f"a vector before the end of the block, where {obstacle}"
    return "a vector of block 0, where llama.cpp adds none" if layer == 0 else ""


def read_control_vector(file: str | os.PathLike[str]) -> tuple[dict[tuple[int, str], SitePatch], dict[str, Any]]:
    """Reads a GGUF control vector, as repeng and llama.cpp's cvector-generator write them.

    Returns:
        SitePatch per (block, "residual") and what the patch remembers of the file.

    Raises:
        ValueError: a file that is no control vector, or a damaged one; it names the file.
    """
    path = as_path("from_control_vector", "file", file)
    try:
        content = read_gguf(path)
        entries = _directions(content)
        hint = content.fields.get(f"{_ARCHITECTURE}.model_hint")
        if not isinstance(hint, str):
            raise Damaged(f"no {_ARCHITECTURE}.model_hint")
    except (Damaged, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"from_control_vector: file must be a GGUF control vector, got {reason}: {path}") from error
    width = next(iter(entries.values())).output_width
    return entries, {"control_vector": path.name, "model_type": hint, "hidden_size": width}


def _directions(content: GgufContent) -> dict[tuple[int, str], SitePatch]:
    architecture = content.fields.get("general.architecture")
    if architecture != _ARCHITECTURE:
        raise Damaged(f"a file of the architecture {architecture!r}")
    entries: dict[tuple[int, str], SitePatch] = {}
    for name, tensor in content.tensors.items():
        found = _NAME.fullmatch(name)
        if found is None:
            raise Damaged(f"a tensor named {name!r:.60}")
        if tensor.ndim != 1 or not tensor.numel() or not is_finite(tensor):
            raise Damaged(f"{name} of the shape {list(tensor.shape)}" if tensor.ndim != 1 else f"NaN or none in {name}")
        entries[int(found[1]), "residual"] = SitePatch(vector=tensor)
    if not entries:
        raise Damaged("no directions")
    if len(widths := {entry.output_width for entry in entries.values()}) > 1:
        raise Damaged(f"directions of the widths {sorted(widths)}")
    return entries
