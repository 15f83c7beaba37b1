"""A model and its tokenizer from a folder or the Hugging Face hub, or a sentence that says what is wrong there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from thought_kernels.models import FAMILIES, unsupported

DTYPES = {
    "auto": "auto",
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_NO_TRANSFORMERS = "load: transformers must be installed, got none; pip install 'thought_kernels[hf]'"


def load(
    model: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    offline: bool = False,
) -> tuple[Any, Any]:
    """Loads a causal language model of a family that the package describes, in eval mode, and its tokenizer.

    Args:
        model: a folder with config.json, or a hub id such as "google/gemma-3-1b-it".
        dtype: of the weights, "auto" (as stored), "float64", "float32", "bfloat16" or "float16".
        device: where the weights go.
        offline: look in the local cache only. A folder is never looked up elsewhere.

    Returns:
        (model, tokenizer). Multimodal Gemma 3 is loaded whole.

    Raises:
        ValueError: an unknown dtype or device, a folder that is not there or holds no usable model or tokenizer, a hub
            id that cannot be had, weights that are missing, or a family without a description.
    """
    if dtype not in DTYPES:
        raise ValueError(f"load: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    place = usable_device("load", device)
    name, local = _place(model)
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "load: model must be loaded by transformers, got none installed; pip install transformers"
        ) from error
    local_only = local or offline
    config = _read("a readable config.json", name, transformers.AutoConfig, local_files_only=local_only)
    if config.model_type not in FAMILIES:
        raise ValueError(unsupported("load", f"type {config.model_type!r}", config.model_type))
    multimodal = hasattr(config, "vision_config")
    kind = transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM
    found, information = _read(
        "weights of this architecture", name, kind, dtype=DTYPES[dtype], local_files_only=local_only,
        output_loading_info=True,
    )  # fmt: skip
    missing = sorted(information["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise ValueError(f"load: model must have all its weights, got {name!r} without {len(missing)}: {missing[:3]}")
    tokenizer = _read("a tokenizer", name, transformers.AutoTokenizer, local_files_only=local_only)
    return found.to(place).eval().requires_grad_(False), tokenizer


def _place(model: str | os.PathLike[str]) -> tuple[str, bool]:
    """(name for transformers, whether it is a folder)."""
    name = os.path.expanduser(os.fspath(model))
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"load: model must be a folder with config.json, got {name!r}, which has none")
        return name, True
    # A hub id is "name" or "owner/name"; anything else can only have been meant as a folder.
    looks_like_path = path.is_absolute() or name.startswith(".") or name.endswith("/") or name.count("/") > 1
    if looks_like_path or path.exists() or not name:
        raise ValueError(f"load: model must be a folder or a hub id, got {name!r}, where no folder is")
    return name, False


def usable_device(function: str, device: torch.device | str) -> torch.device:
    """The device, after a number has been written to it and read back.

    Raises:
        ValueError: one that is not here, or, as "meta", holds no numbers; `function` opens the sentence.
    """
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{function}: device must be one that torch can use here, got {str(device)!r}; {reason}"
        ) from error
    return place


def _read(wanted: str, name: str, kind: Any, **options: Any) -> Any:
    try:
        return kind.from_pretrained(name, **options)
    except Exception as error:  # transformers, safetensors, tokenizers and the hub each raise types of their own
        reason = str(error).strip().split("\n")[0]
        where = "" if os.path.isdir(name) else ", where no folder is; as a hub id:"
        raise ValueError(f"load: model must have {wanted}, got none from {name!r}{where or ';'} {reason}") from error


def load_tokenizer(model: str | os.PathLike[str], *, offline: bool = False) -> Any:
    """The tokenizer of a folder or hub id alone; arguments and errors are those of load."""
    name, local = _place(model)
    try:
        import transformers
    except ImportError as error:
        raise ValueError(_NO_TRANSFORMERS) from error
    return _read("a tokenizer", name, transformers.AutoTokenizer, local_files_only=local or offline)


def context_length(model: str | os.PathLike[str], *, offline: bool = False) -> int | None:
    """How many positions the text model of a folder or hub id has, None where its config does not say."""
    name, local = _place(model)
    try:
        import transformers
    except ImportError as error:
        raise ValueError(_NO_TRANSFORMERS) from error
    config = _read("a readable config.json", name, transformers.AutoConfig, local_files_only=local or offline)
    return getattr(config.get_text_config(), "max_position_embeddings", None)
