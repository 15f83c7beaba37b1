"""A model and its tokenizer from a folder, the Hugging Face hub or a GGUF file, or a sentence that says what is wrong.

transformers reads all three. What it gives of a GGUF file it does not save again, and with some packages installed it
leaves the weights packed; here they are unpacked into an ordinary model, which merges and saves like any other.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from thought_kernels.models import FAMILIES, unsupported
from thought_kernels.ops.checks import as_path

DTYPES: dict[str, str | torch.dtype] = {
    "auto": "auto",
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")  # which transformers prefers to a GGUF file
_INSTALL = "pip install 'thought_kernels[hf]'"


@dataclass(frozen=True)
class _Source:
    """Where a model is: `name` for transformers, `gguf` the file in that folder, `options` for each from_pretrained."""

    name: str
    gguf: str | None
    local: bool

    @property
    def options(self) -> dict[str, Any]:
        named = {} if self.gguf is None else {"gguf_file": self.gguf}
        return {"local_files_only": self.local, **named}

    @property
    def shown(self) -> str:
        return self.name if self.gguf is None else os.path.join(self.name, self.gguf)


def load(
    model: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str = "cpu",
    offline: bool = False,
) -> tuple[Any, Any]:
    """Loads a causal language model of a family that the package describes, in eval mode, and its tokenizer.

    Args:
        model: a folder with config.json, a hub id such as "google/gemma-3-1b-it", a .gguf file, or a folder that holds
            one such file and no config.json or no other weights. Weights of a GGUF file are unpacked, which takes a
            minute or so.
        dtype: of the weights, "auto" (as stored; float32 for GGUF), or torch's float64, float32, bfloat16 or float16
            or its name.
        device: where the weights go.
        offline: look in the local cache only. Folders and files are never looked up elsewhere.

    Returns:
        (model, tokenizer). Multimodal Gemma 3 is loaded whole.

    Raises:
        ValueError: an unknown dtype or device, a folder or file that is not there or holds no usable model or
            tokenizer, a hub id that cannot be had, weights that are missing, a tokenizer that is not a fast one, or a
            family without a description.
    """
    if dtype not in DTYPES and dtype not in DTYPES.values():
        raise ValueError(f"load: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    place = usable_device("load", device)
    transformers = _transformers()
    source = _source(model, offline)
    config = _config(source)
    if config.model_type not in FAMILIES:  # before the weights are read
        raise ValueError(unsupported("load", f"type {config.model_type!r}", config.model_type))
    found = _weights(source, config, DTYPES[dtype] if isinstance(dtype, str) else dtype)
    tokenizer = _tokenizer(source, transformers)
    return found.to(place).eval().requires_grad_(False), tokenizer


def load_tokenizer(model: str | os.PathLike[str], *, offline: bool = False) -> Any:
    """The tokenizer of a folder, hub id or GGUF file alone; arguments and errors are those of load."""
    return _tokenizer(_source(model, offline), _transformers())


def is_on_hub(model: str | os.PathLike[str], *, offline: bool = False) -> bool:
    """Whether the hub is asked for a model, and not a folder, a file or the local cache alone; raises as load does."""
    return not _source(model, offline).local


def context_length(model: str | os.PathLike[str], *, offline: bool = False) -> int | None:
    """How many positions a folder's, hub id's or GGUF file's text model has, None where its config does not say."""
    return getattr(_config(_source(model, offline)).get_text_config(), "max_position_embeddings", None)


def block_count(model: str | os.PathLike[str], *, offline: bool = False) -> int | None:
    """How many blocks a folder's, hub id's or GGUF file's text model has, None where its config does not say."""
    return getattr(_config(_source(model, offline)).get_text_config(), "num_hidden_layers", None)


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


def _source(model: str | os.PathLike[str], offline: bool) -> _Source:
    as_path("load", "model", model)
    name = os.path.expanduser(os.fspath(model))
    path = Path(name)
    if path.is_file():
        return _gguf(path)
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        described = (path / "config.json").is_file()
        if described and (len(files) != 1 or any(any(path.glob(pattern)) for pattern in _WEIGHT_FILES)):
            return _Source(name, None, local=True)
        if len(files) == 1:
            return _gguf(files[0])
        if (path / "thought_patch.json").is_file():
            raise ValueError(
                f"load: model must be a folder with a model, got {name!r}, which holds a patch; load the patch with "
                "ThoughtPatch.from_pretrained or name it by --patch, and the model from its own folder"
            )
        held = f"{len(files)} GGUF files: {[file.name for file in files[:3]]}; name one of them" if files else "none"
        raise ValueError(
            f"load: model must be a folder with config.json or with one GGUF file, got {name!r}, which has {held}"
        )
    # A hub id is "name" or "owner/name"; anything else can only have been meant as a folder.
    looks_like_path = path.is_absolute() or name.startswith(".") or name.endswith(("/", ".gguf")) or name.count("/") > 1
    if looks_like_path or path.exists() or not name:
        raise ValueError(f"load: model must be a folder, a .gguf file or a hub id, got {name!r}, where nothing is")
    return _Source(name, None, local=offline)


def _gguf(path: Path) -> _Source:
    with path.open("rb") as file:
        opening = file.read(4)
    if opening != b"GGUF":
        raise ValueError(
            f"load: model must be a folder, a hub id or a GGUF file, got {str(path)!r}, which begins with {opening!r} "
            "in place of b'GGUF'"
        )
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise ValueError(f"load: {' and '.join(missing)} must be installed to read a GGUF file, got none; {_INSTALL}")
    return _Source(str(path.parent), path.name, local=True)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"load: transformers must be installed, got none; {_INSTALL}") from error
    return transformers


def _config(source: _Source) -> Any:
    wanted = "a readable config.json" if source.gguf is None else "readable metadata of a known architecture"
    return _read(wanted, source, _transformers().AutoConfig)


def _weights(source: _Source, config: Any, dtype: str | torch.dtype) -> Any:
    transformers = _transformers()
    multimodal = hasattr(config, "vision_config")
    kind = transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM
    options: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
    softcap = FAMILIES[config.model_type].softcap
    if softcap and getattr(config, softcap):  # some versions' default attention leaves the cap out
        options["attn_implementation"] = "eager"
    if source.gguf is not None:
        options["dtype"] = torch.float32 if dtype == "auto" else dtype
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    found, information = _read("weights of this architecture", source, kind, **options)
    missing = sorted(information["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise ValueError(
            f"load: model must have all its weights, got {source.shown!r} without {len(missing)}: {missing[:3]}"
        )
    return found if source.gguf is None else _ordinary(found, kind, source)


def _ordinary(packed: Any, kind: Any, source: _Source) -> Any:
    """A model like any other with the unpacked weights of a GGUF model, which transformers would not save."""
    config = copy.deepcopy(packed.config)
    vars(config).pop("quantization_config", None)
    config._name_or_path = source.shown
    model = kind.from_config(config, dtype=packed.dtype)
    model.load_state_dict(packed.state_dict(), assign=True)
    model.tie_weights()  # what was assigned by two names is one parameter again
    model.generation_config = packed.generation_config
    return model


def _tokenizer(source: _Source, transformers: Any) -> Any:
    tokenizer = _read("a tokenizer", source, transformers.AutoTokenizer)
    if not tokenizer.is_fast:
        raise ValueError(
            f"load: model must have a fast tokenizer, which tells each token's characters, got {source.shown!r} with "
            f"{type(tokenizer).__name__}; save a tokenizer.json beside it"
        )
    return tokenizer


def _read(wanted: str, source: _Source, kind: Any, **options: Any) -> Any:
    try:
        return kind.from_pretrained(source.name, **source.options, **options)
    except Exception as error:  # transformers, safetensors, tokenizers and the hub each raise types of their own
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        where = ";" if source.gguf is not None or os.path.isdir(source.name) else ", where no folder is; as a hub id:"
        hint = "" if source.gguf is None else "; a file that was cut or damaged must be fetched again"
        raise ValueError(
            f"load: model must have {wanted}, got none from {source.shown!r}{where} {reason}{hint}"
        ) from error
