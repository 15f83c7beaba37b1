"""A transmutation that can go on where it was stopped: what the model wrote, and the last block that was done.

A folder holds inputs.json and rows.json, and blocks-N, which holds what `sequential` carries from block N − 1 to block
N, the patch so far with it. Each is complete under another name before it takes its own, so that whenever the process
ends the folder holds one state or the next. What is resumed is, bit for bit, what would have been: the same numbers go
on in the same order.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thought_kernels.ops.caller import warn
from thought_kernels.ops.checks import as_path
from thought_kernels.patches import storage
from thought_kernels.patches.storage import replace_files
from thought_kernels.prompts.prompt import EncodedExample
from thought_kernels.version import __version__

EVERY = 30.0  # seconds between two states of blocks: a block of a small model takes less time than to write it down
_SHARE = 20  # and so many times as long as the last one took, which holds all matrices so far
_RUN, _STREAMS, _STATE = "run.json", "streams.bin", "state.json"


class Checkpoint:
    """The folder of one run; another run's content is taken away when this one begins.

    Args:
        directory: created if it does not exist.

    Raises:
        ValueError: a file, or a folder that holds something else.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.folder = as_path("transmute", "checkpoint", directory)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"transmute: checkpoint must be a folder, got the file {self.folder}")
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / _RUN).exists():
            raise ValueError(
                f"transmute: checkpoint must be a folder of its own, got {self.folder}, which holds other files; name "
                "one that is empty or not there"
            )
        self._due = time.monotonic() + EVERY

    def begin(self, run: Mapping[str, Any]) -> None:
        """Says which run this is, by JSON values; what another one left here is removed."""
        key = hashlib.sha256(
            json.dumps({**run, "version": __version__}, sort_keys=True, default=str).encode()
        ).hexdigest()
        if self._read(_RUN) != key:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._write(_RUN, key)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """JSON values that are made once: in this run, or before it was stopped."""
        held = self._read(f"{name}.json")
        if held is None:
            held = make()
            self._write(f"{name}.json", held)
        return held

    def rows(self, make: Callable[[], list[EncodedExample]]) -> list[EncodedExample]:
        """As once, of examples."""
        return [EncodedExample(**row) for row in self.once("rows", lambda: [row._asdict() for row in make()])]

    def keep(
        self, blocks: int, streams: Sequence[Tensor], entries: storage.Entries, provenance: Mapping[str, Any]
    ) -> None:
        """Keeps what goes on after so many blocks, unless that was done a moment ago, in place of what was kept before.

        A disk without room costs the state and not the run.
        """
        started = time.monotonic()
        if started < self._due or not entries:
            return
        partial = self.folder / f".{secrets.token_hex(4)}"
        try:
            storage.save(entries, provenance, partial)
            digest = _write_tensors(partial / _STREAMS, streams)
            replace_files(partial, {_STATE: json.dumps({"blocks": blocks, "sha256": digest}).encode()})
            old = self._states()
            partial.rename(self.folder / f"blocks-{blocks}")
            for path in old:
                shutil.rmtree(path, ignore_errors=True)
        except OSError as error:
            warn(f"transmute: checkpoint could not be written, {error.strerror}; this run goes on without")
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            now = time.monotonic()
            self._due = now + max(EVERY, _SHARE * (now - started))

    def restore(self, streams: Sequence[Tensor]) -> tuple[int, dict[tuple[int, str], Any], dict[str, Any]]:
        """Fills the streams with what was kept; says how many blocks are done, 0 for none, with the patch so far."""
        for path in self._states():
            try:
                state = json.loads((path / _STATE).read_text())
                entries, provenance = storage.load(path)
                _read_tensors(path / _STREAMS, streams, state["sha256"])
                return state["blocks"], entries, provenance
            except (OSError, ValueError, KeyError):  # damaged: what it held is computed again
                continue
        return 0, {}, {}

    def remove(self) -> None:
        """Takes the folder away: the patch is there."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _states(self) -> list[Path]:
        """Those of blocks, the latest first."""
        return sorted(self.folder.glob("blocks-*"), key=lambda path: -int(path.name.partition("-")[2]))

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _write(self, name: str, content: Any) -> None:
        try:
            replace_files(self.folder, {name: json.dumps(content).encode()})
        except OSError as error:
            raise ValueError(
                f"transmute: checkpoint must be a folder that can be written, got {error.strerror}: {self.folder}"
            ) from error


def _write_tensors(path: Path, tensors: Sequence[Tensor]) -> str:
    """The tensors' bytes one after the other; their sha256."""
    with path.open("wb") as file:
        for tensor in tensors:
            tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)
        file.flush()
        os.fsync(file.fileno())
    return _digest(path)


def _read_tensors(path: Path, tensors: Sequence[Tensor], digest: str) -> None:
    """Fills the tensors with a file's bytes.

    Raises:
        ValueError: a file of another length or sha256. Nothing is filled then.
    """
    if path.stat().st_size != sum(tensor.numel() * tensor.itemsize for tensor in tensors) or _digest(path) != digest:
        raise ValueError(f"{path} is damaged")
    with path.open("rb") as file:
        for tensor in tensors:
            content = torch.from_numpy(np.fromfile(file, np.uint8, tensor.numel() * tensor.itemsize))
            tensor.copy_(content.view(tensor.dtype).view(tensor.shape))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
