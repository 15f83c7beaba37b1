"""A transmutation that can go on where it was stopped: what the model wrote, and the last block that was done.

Of several processes each has a folder of its own in it, and they keep and take up the same blocks.

A folder holds inputs.json and rows.json, and blocks-N, which holds what `sequential` carries from block N − 1 to block
N, the patch so far with it. Each is complete under another name before it takes its own, so that whenever the process
ends the folder holds one state or the next. What is resumed is, bit for bit, what would have been: the same numbers go
on in the same order.
"""

from __future__ import annotations

import contextlib
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

from thought_kernels.generation.processes import ALONE, Processes
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
        processes: of the run, which all make the same calls.

    Raises:
        ValueError: a file, or a folder that holds something else.
    """

    def __init__(self, directory: str | os.PathLike[str], processes: Processes = ALONE) -> None:
        whole = as_path("transmute", "checkpoint", directory)
        self.folder = whole if processes.size == 1 else whole / f"process-{processes.rank}"
        if whole.exists() and not whole.is_dir():
            raise ValueError(f"transmute: checkpoint must be a folder, got the file {whole}")
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / _RUN).exists():
            raise ValueError(
                f"transmute: checkpoint must be a folder of its own, got {self.folder}, which holds other files; name "
                "one that is empty or not there"
            )
        self._processes, self._due = processes, time.monotonic() + EVERY

    def begin(self, run: Mapping[str, Any]) -> None:
        """Says which run this is, by JSON values; what another one left here is removed."""
        told = {**run, "processes": self._processes.size, "version": __version__}
        key = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
        if self._read(_RUN) != key:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._write(_RUN, key)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """JSON values that are made once: in this run, or before it was stopped."""
        held = self._read(f"{name}.json")
        if not all(self._processes.everyone(held is not None)):  # all make it: they do so together
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
        if not self._processes.everyone(started >= self._due)[0] or not entries:
            return
        old, partial = self._states(), self.folder / f".{secrets.token_hex(4)}"
        try:
            written = self._written(partial, blocks, streams, entries, provenance)
            if all(self._processes.everyone(written)):
                partial.rename(self.folder / f"blocks-{blocks}")
                self._processes.everyone(True)  # no state goes before all have the next
                for path in old.values():
                    shutil.rmtree(path, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            now = time.monotonic()
            self._due = now + max(EVERY, _SHARE * (now - started))

    def _written(
        self, folder: Path, blocks: int, streams: Sequence[Tensor], entries: storage.Entries,
        provenance: Mapping[str, Any],
    ) -> bool:  # fmt: skip
        """Writes a state; whether there was room."""
        try:
            storage.save(entries, provenance, folder)
            digest = _write_tensors(folder / _STREAMS, streams)
            replace_files(folder, {_STATE: json.dumps({"blocks": blocks, "sha256": digest}).encode()})
        except OSError as error:
            warn(f"transmute: checkpoint could not be written, {error.strerror}; this run goes on without")
            return False
        return True

    def restore(self, streams: Sequence[Tensor]) -> tuple[int, dict[tuple[int, str], Any], dict[str, Any]]:
        """Fills the streams with what was kept; says how many blocks are done, 0 for none, with the patch so far."""
        states = self._states()
        shared = set.intersection(*map(set, self._processes.everyone(list(states))))
        for blocks in sorted(shared, reverse=True):
            found = _state(states[blocks], streams)
            if all(self._processes.everyone(found is not None)) and found is not None:
                _fill(states[blocks] / _STREAMS, streams)
                return blocks, *found
        return 0, {}, {}

    def remove(self) -> None:
        """Takes the folder away: the patch is there."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._processes.size > 1:
            with contextlib.suppress(OSError):  # the others' folders are still there, or it is gone
                self.folder.parent.rmdir()

    def _states(self) -> dict[int, Path]:
        """Folders by how many blocks are done in them."""
        return {int(path.name.partition("-")[2]): path for path in self.folder.glob("blocks-*")}

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


def _state(path: Path, streams: Sequence[Tensor]) -> tuple[dict[tuple[int, str], Any], dict[str, Any]] | None:
    """The patch so far of a state that is whole and has streams of these sizes; None of another."""
    try:
        told, size = json.loads((path / _STATE).read_text()), (path / _STREAMS).stat().st_size
        if size != sum(stream.numel() * stream.itemsize for stream in streams):
            return None
        return storage.load(path) if _digest(path / _STREAMS) == told["sha256"] else None
    except (OSError, ValueError, KeyError):
        return None


def _write_tensors(path: Path, tensors: Sequence[Tensor]) -> str:
    """The tensors' bytes one after the other; their sha256."""
    with path.open("wb") as file:
        for tensor in tensors:
            tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)
        file.flush()
        os.fsync(file.fileno())
    return _digest(path)


def _fill(path: Path, tensors: Sequence[Tensor]) -> None:
    """Fills the tensors with a file's bytes."""
    with path.open("rb") as file:
        for tensor in tensors:
            content = torch.from_numpy(np.fromfile(file, np.uint8, tensor.numel() * tensor.itemsize))
            tensor.copy_(content.view(tensor.dtype).view(tensor.shape))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
