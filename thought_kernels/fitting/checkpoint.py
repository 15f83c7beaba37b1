"""A transmutation that can go on where it was stopped: what the model wrote, and the last block that was done.

A folder holds inputs.json and rows.json, and blocks-N, which holds what `sequential` carries from block N − 1 to block
N, the patch so far with it. Each names the run that it is of, and is complete under another name before it takes its
own, so that whenever the process ends the folder holds one state or the next. What is resumed is, bit for bit, what
would have been: the same numbers go on in the same order. Of several processes each has a folder of its own in it, and
they keep and take up the same blocks.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thought_kernels.generation.processes import ALONE, Processes
from thought_kernels.models.linear import bias_of
from thought_kernels.models.quantised import dequantised, unpacks
from thought_kernels.ops.caller import warn
from thought_kernels.ops.checks import as_path
from thought_kernels.patches import storage
from thought_kernels.patches.merge import checksum
from thought_kernels.patches.storage import replace_files
from thought_kernels.prompts.prompt import EncodedExample
from thought_kernels.version import __version__

EVERY = 30.0  # seconds between two states of blocks: a block of a small model takes less time than to write it down
_SHARE = 20  # and so many times as long as the last one took, which holds all matrices so far
_STREAMS, _STATE = "streams.bin", "state.json"
_OURS = re.compile(r"(inputs|rows)\.json|blocks-\d+|process-\d+|\..*[0-9a-f]{8}")  # the last: under another name


class Checkpoint:
    """The folder of one run. What it holds of another one is not read, and goes as this one keeps its own.

    Args:
        directory: created if it does not exist.
        processes: of the run, which all make the same calls.

    Raises:
        ValueError: a file, a folder that holds something else, or one that cannot be made.
    """

    def __init__(self, directory: str | os.PathLike[str], processes: Processes = ALONE) -> None:
        whole = as_path("transmute", "checkpoint", directory)
        if whole.exists() and not whole.is_dir():
            raise ValueError(f"transmute: checkpoint must be a folder, got the file {whole}")
        others = [path.name for path in whole.glob("*") if not _OURS.fullmatch(path.name)] if whole.exists() else []
        if others:
            raise ValueError(
                f"transmute: checkpoint must be a folder of its own, got {whole}, which holds {others[0]}; name one "
                "that is empty or not there"
            )
        self.folder = whole if processes.size == 1 else whole / f"process-{processes.rank}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"transmute: checkpoint must be a folder that can be made, got {error.strerror or error}: {whole}"
            ) from error
        self._processes, self._run, self._due = processes, "", time.monotonic() + EVERY
        for path in self.folder.glob(".*"):  # of a process that was killed as it wrote
            _remove(path)

    def begin(self, run: str) -> None:
        """Says which run this is, as `run_key` does."""
        self._run = run

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """JSON values that are made once: in this run, or before it was stopped."""
        path = self.folder / f"{name}.json"
        held = _read(path, self._run)
        if all(self._processes.everyone(held is not None)) and held is not None:
            return held["made"]
        made = make()  # where one has to make it all do: they do so together
        content = json.dumps({"run": self._run, "made": made}).encode()
        self._tried(lambda: replace_files(self.folder, {path.name: content}))
        return made

    def rows(self, make: Callable[[], list[EncodedExample]]) -> list[EncodedExample]:
        """As once, of examples."""
        return [EncodedExample(**row) for row in self.once("rows", lambda: [row._asdict() for row in make()])]

    def keep(
        self, blocks: int, streams: Sequence[Tensor], entries: storage.Entries, provenance: Mapping[str, Any]
    ) -> None:
        """Keeps what goes on after so many blocks, unless that was done a moment ago, in place of what was kept before.

        A disk without room costs the state and not the run. For a moment the patch so far is in memory twice more.
        """
        started = time.monotonic()
        if not self._processes.everyone(started >= self._due)[0] or not entries:
            return
        old, partial = list(self.folder.glob("blocks-*")), self.folder / f".{secrets.token_hex(4)}"
        final = self.folder / f"blocks-{blocks}"

        def write() -> None:
            storage.save(entries, provenance, partial)
            state = {"run": self._run, "blocks": blocks, "sha256": _write_tensors(partial / _STREAMS, streams)}
            replace_files(partial, {_STATE: json.dumps(state).encode()})
            _remove(final)  # of a state that not all processes have, or a damaged one

        if all(self._processes.everyone(self._tried(write))) and all(
            self._processes.everyone(self._tried(lambda: partial.rename(final)))
        ):  # no state goes before all have the next
            for path in old:
                if path != final:
                    _remove(path)
        _remove(partial)
        now = time.monotonic()
        self._due = now + max(EVERY, _SHARE * (now - started))

    def restore(self, streams: Sequence[Tensor]) -> tuple[int, dict[tuple[int, str], Any], dict[str, Any]]:
        """Fills the streams with what was kept; says how many blocks are done, 0 for none, with the patch so far."""
        states = {int(path.name.partition("-")[2]): path for path in self.folder.glob("blocks-*")}
        shared = set.intersection(*map(set, self._processes.everyone(list(states))))
        for blocks in sorted(shared, reverse=True):
            found = _state(states[blocks], self._run, streams)
            if all(self._processes.everyone(found is not None)) and found is not None:
                _fill(states[blocks] / _STREAMS, streams)
                return blocks, *found
        return 0, {}, {}

    def _tried(self, write: Callable[[], object]) -> bool:
        """Whether something could be written; what is not costs a run that is stopped some work, and no other."""
        try:
            write()
        except OSError as error:
            warn(f"transmute: checkpoint could not be written, {error.strerror or error}; this run goes on")
            return False
        return True


def run_key(model: torch.nn.Module, told: Mapping[str, Any]) -> str:
    """A hash of all that decides what a run makes: JSON values, weights and buffers, what is hooked, versions."""
    hooked = [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()]
    run = {
        **told, "version": __version__, "torch": torch.__version__,
        "weights": [(name, str(tensor.dtype), list(tensor.shape), _sum(tensor)) for name, tensor in _weights(model)],
        "hooks": [one for one in hooked if any(one[1:])],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(run, sort_keys=True, default=str).encode()).hexdigest()


def _weights(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and what modules hold that torch has quantised, which have neither."""
    yield from (*model.named_parameters(), *model.named_buffers())
    for name, module in model.named_modules():
        if callable(getattr(module, "weight", None)):
            unpacked = (dequantised(module), bias_of(module))
            yield from ((name, one) for one in unpacked if isinstance(one, Tensor))


def _sum(tensor: Tensor) -> int | str:
    """As merge's; of packed weights, which have no bits of their own, by the numbers they stand for, or as saved."""
    try:
        return checksum(tensor.dequantize() if unpacks(tensor) else tensor)
    except (RuntimeError, NotImplementedError, KeyError, TypeError):
        content = io.BytesIO()
        torch.save(tensor.detach(), content)
        return hashlib.sha256(content.getvalue()).hexdigest()


def _read(path: Path, run: str) -> dict[str, Any] | None:
    """The JSON object of a file, None where there is none of this run."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) and held.get("run") == run else None


def _state(path: Path, run: str, streams: Sequence[Tensor]) -> tuple[dict[tuple[int, str], Any], dict[str, Any]] | None:
    """The patch so far of a state of this run that is whole and has streams of these sizes; None of another."""
    told = _read(path / _STATE, run)
    try:
        if told is None or (path / _STREAMS).stat().st_size != sum(one.numel() * one.itemsize for one in streams):
            return None
        return storage.load(path) if _digest(path / _STREAMS) == told.get("sha256") else None
    except (OSError, ValueError):
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


def _remove(path: Path) -> None:
    """A file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
