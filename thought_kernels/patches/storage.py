"""A patch as a folder: tensors in safetensors, everything else in JSON that holds the tensors' sha256. No pickle.

thought_patch.json: {"format", "checksum", "record"}. record holds "sha256" (of thought_patch.safetensors), "entries"
([{"layer", "site", "tensors", "fit"}]) and "provenance"; checksum is the sha256 of the record itself. Tensors are named
"block.site.name".
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from thought_kernels.ops.checks import as_path
from thought_kernels.patches.card import CARD_FILE, is_ours
from thought_kernels.patches.site import DTYPES, SITES, Fit, SitePatch, is_finite

FORMAT = "thought_kernels patch, version 1"
TENSOR_FILE = "thought_patch.safetensors"
RECORD_FILE = "thought_patch.json"
TENSOR_NAMES = ("matrix", "left", "right", "vector", "activation_mean")

Entries = Mapping[tuple[int, str], SitePatch]


def save(
    entries: Entries, provenance: Mapping[str, Any], directory: str | os.PathLike[str], *, card: str | None = None
) -> None:
    """Writes a patch folder; its files are complete under temporary names before any replaces an older one.

    Should the machine stop between the two replacements, ``load`` refuses the folder by its checksum.

    Args:
        entries: SitePatch per (block, site).
        provenance: values that JSON can hold.
        directory: created if it does not exist.
        card: README.md, written unless there is one by somebody else; None for none.

    Raises:
        ValueError: NaN or an infinity in a tensor, a provenance that JSON cannot hold, or a path that is not a folder.
    """
    folder = as_folder("save_pretrained", directory)
    tensors: dict[str, Tensor] = {}
    listed = []
    for (layer, site), entry in entries.items():
        named = entry.tensors()
        for name, tensor in named.items():
            if not is_finite(tensor):
                raise ValueError(
                    f"save_pretrained: {name} must be finite, got NaN or an infinity; block {layer}, site {site!r}"
                )
            # safetensors refuses views and tensors that share memory.
            tensors[f"{layer}.{site}.{name}"] = tensor.detach().to("cpu", copy=True).contiguous()
        fit = None if entry.fit is None else {name: _encoded(value) for name, value in asdict(entry.fit).items()}
        listed.append({"layer": layer, "site": site, "tensors": sorted(named), "fit": fit})
    payload = safetensors.torch.save(tensors)
    try:
        # Through JSON once, so that the checksum is that of what will be read back (lists for tuples, text keys).
        described = json.loads(json.dumps(dict(provenance), allow_nan=False))
        record = {"sha256": hashlib.sha256(payload).hexdigest(), "entries": listed, "provenance": described}
        document = {"format": FORMAT, "checksum": _checksum(record), "record": record}
        text = json.dumps(document, indent=2, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"save_pretrained: provenance must hold JSON values only, got {error}") from error

    cards = {CARD_FILE: card.encode()} if card is not None and is_ours(folder / CARD_FILE) else {}
    replace_files(folder, {TENSOR_FILE: payload, RECORD_FILE: text, **cards})


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes files to a folder: all are complete on disk under temporary names before the first replaces an older one.

    Args:
        folder: created if it does not exist.
        contents: bytes by file name, in the order of replacement.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[tuple[Path, Path]] = []
    try:
        for name, content in contents.items():
            temporary = folder / f".{name}.{secrets.token_hex(4)}"
            written.append((temporary, folder / name))
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for temporary, final in written:
            os.replace(temporary, final)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Returns when a written file's content has left the computer's memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def as_folder(function: str, directory: str | os.PathLike[str]) -> Path:
    """The directory as a Path, which need not exist; raises as as_path, and ValueError for a file."""
    folder = as_path(function, "directory", directory)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{function}: directory must be a folder, got the file {folder}")
    return folder


def load(directory: str | os.PathLike[str]) -> tuple[dict[tuple[int, str], SitePatch], dict[str, Any]]:
    """Reads a patch folder, checking everything it says against everything it holds.

    Args:
        directory: a folder written by ``save``.

    Returns:
        Entries per (block, site), tensors on the CPU, and the provenance.

    Raises:
        ValueError: a file that is missing, truncated, altered, of another version or holds NaN; it names the file.
    """
    folder = as_path("from_pretrained", "directory", directory)
    _check_kind(folder)
    record_path, tensor_path = folder / RECORD_FILE, folder / TENSOR_FILE
    record = _read_record(record_path)
    payload = _read(tensor_path)
    digest = hashlib.sha256(payload).hexdigest()
    if digest != record["sha256"]:
        raise damaged(
            tensor_path, f"have the sha256 that {RECORD_FILE} names, {record['sha256'][:12]}…", f"{digest[:12]}…"
        )
    try:
        tensors = safetensors.torch.load(payload)
    except Exception as error:  # the reader raises its own types, which differ between its versions
        raise damaged(tensor_path, "be a safetensors file", str(error)) from error
    expected = [f"{entry['layer']}.{entry['site']}.{name}" for entry in record["entries"] for name in entry["tensors"]]
    if sorted(expected) != sorted(tensors):
        different = sorted(set(expected) ^ set(tensors)) or sorted(expected)
        raise damaged(tensor_path, f"hold exactly the tensors that {RECORD_FILE} lists", f"others: {different[:3]}")
    for name, tensor in tensors.items():
        known = tensor.dtype in DTYPES
        if not known or not is_finite(tensor):
            actual = "NaN or an infinity" if known else str(tensor.dtype)
            raise damaged(tensor_path, f"hold finite floating numbers in {name}", actual)
    entries = {}
    for listed in record["entries"]:
        key = (listed["layer"], listed["site"])
        named = {name: tensors[f"{key[0]}.{key[1]}.{name}"] for name in listed["tensors"]}
        factors = (named["left"], named["right"]) if {"left", "right"} <= named.keys() else None
        fit = None if listed["fit"] is None else Fit(**{name: _decoded(value) for name, value in listed["fit"].items()})
        try:
            entries[key] = SitePatch(
                named.get("matrix"), factors, named.get("vector"), named.get("activation_mean"), fit
            )
        except (TypeError, ValueError) as error:
            raise damaged(tensor_path, f"hold a patch for block {key[0]}, site {key[1]!r}", str(error)) from error
    return entries, record["provenance"]


def _check_kind(folder: Path) -> None:
    """Raises for what is easily taken for a patch's folder: a patch's exports, and other files."""
    if not folder.exists() or any((folder / name).exists() for name in (RECORD_FILE, TENSOR_FILE)):
        return
    kinds = {
        "adapter_config.json": "a LoRA adapter, which peft's PeftModel.from_pretrained loads",
        "config.json": "a model, which thought_kernels.load loads",
    }
    found = next((f"{what}, by its {name}" for name, what in kinds.items() if (folder / name).exists()), None)
    if folder.is_file():
        hint = "; ThoughtPatch.from_control_vector reads control vectors" if folder.suffix == ".gguf" else ""
        found = f"a file{hint}"
    if found is None:
        others = sorted(path.name for path in folder.iterdir())
        found = f"a folder with {', '.join(others[:3])}{' and more' * (len(others) > 3)}" if others else "an empty one"
    raise ValueError(
        f"from_pretrained: directory must be a folder that save_pretrained wrote, with {RECORD_FILE}, got {found}: "
        f"{folder}"
    )


def _read_record(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_read(path).decode(), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise damaged(path, "be a patch's record", "JSON nested too deep to read") from error
    except ValueError as error:  # covers undecodable bytes and malformed JSON
        if str(error).startswith("from_pretrained:"):
            raise
        raise damaged(path, "be valid JSON", str(error)) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        actual = repr(document.get("format")) if isinstance(document, dict) else type(document).__name__
        raise damaged(path, f"have format {FORMAT!r}", actual)
    record = document.get("record")
    try:
        intact = isinstance(record, dict) and _checksum(record) == document.get("checksum")
    except RecursionError as error:
        raise damaged(path, "be a patch's record", "JSON nested too deep to read") from error
    if not isinstance(record, dict) or not intact:
        raise damaged(path, "match its own checksum", "other content; it was altered after it was saved")
    # A record with a right checksum can still come from another writer.
    wanted: dict[str, Callable[[Any], bool]] = {
        "sha256": lambda value: isinstance(value, str),
        "provenance": lambda value: isinstance(value, dict),
        "entries": lambda value: isinstance(value, list) and bool(value) and all(map(_is_entry, value)),
    }
    for name, holds in wanted.items():
        if not holds(record.get(name)):
            raise damaged(path, f"hold a well-formed {name!r}", repr(record.get(name))[:80])
    keys = [(entry["layer"], entry["site"]) for entry in record["entries"]]
    if len(set(keys)) < len(keys):
        raise damaged(path, "list each block and site once", "a repetition")
    return record


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"layer", "site", "tensors", "fit"}:
        return False
    layer, fit = entry["layer"], entry["fit"]
    names = {field.name for field in fields(Fit)}
    old = names - {"anisotropy", "spherical_scale", "best_scale"}  # what patches had before those were recorded
    return (
        isinstance(layer, int)
        and not isinstance(layer, bool)
        and layer >= 0
        and entry["site"] in SITES
        and isinstance(entry["tensors"], list)
        and all(isinstance(name, str) and name in TENSOR_NAMES for name in entry["tensors"])
        and len(set(entry["tensors"])) == len(entry["tensors"])
        and ("left" in entry["tensors"]) == ("right" in entry["tensors"])
        and (
            fit is None or (isinstance(fit, dict) and old <= fit.keys() <= names and all(map(_is_number, fit.values())))
        )
    )


def _is_number(value: Any) -> bool:
    return value is None or value == "inf" or (isinstance(value, int | float) and not isinstance(value, bool))


def _encoded(value: Any) -> Any:
    # JSON has no infinity, and a singular Gram matrix has that condition number.
    return "inf" if value == math.inf else value


def _decoded(value: Any) -> Any:
    return math.inf if value == "inf" else value


def _checksum(record: Mapping[str, Any]) -> str:
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"the constant {name}, which JSON does not have")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise damaged(path, "be a readable file", error.strerror or str(error)) from error


def damaged(path: Path, rule: str, actual: str) -> ValueError:
    """The error of a file that does not hold what it must."""
    return ValueError(f"from_pretrained: {path} must {rule}, got {actual}")
