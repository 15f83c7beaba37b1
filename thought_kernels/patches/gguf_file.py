"""GGUF files: written through the gguf package, read here, since what is read may come from anybody.

A damaged length makes the gguf package's reader loop as often as the length says. Here every length is held against
the bytes that are left before anything is read. What this package writes carries a sha256 of its tensors.

Source: the GGUF specification, version 3, ggml/docs/gguf.md.
"""

from __future__ import annotations

import hashlib
import mmap
import secrets
import struct
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from thought_kernels.patches.storage import to_disk

_DIGEST = "thought_kernels.sha256"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOATS: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}  # tensor types that are plain numbers
_MOST_DIMENSIONS = 4


class GgufContent(NamedTuple):
    """A GGUF file's fields, without its arrays, and its tensors in the order of dimensions that torch has."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]


class Damaged(ValueError):
    """What is wrong with a file, as the end of a sentence."""


def check_gguf(function: str) -> None:
    """Raises ValueError without the gguf package, which names tensors and writes files."""
    if find_spec("gguf") is None:
        raise ValueError(
            f"{function}: gguf must be installed to write a GGUF file, got none; pip install 'thought_kernels[hf]'"
        )


def write_gguf(
    function: str, path: Path, architecture: str, fields: Mapping[str, str | int | float], tensors: Mapping[str, Tensor]
) -> None:
    """Writes a GGUF file with float32 tensors; it is complete under a temporary name before it replaces an older one.

    Args:
        function: opens the error's sentence.
        path: the file. Its folder is created.
        architecture: general.architecture.
        fields: further metadata; an int becomes a uint32, a float a float32.
        tensors: by name, of any float dtype.

    Raises:
        ValueError: without the gguf package.
    """
    check_gguf(function)
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    arrays = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    try:
        writer = gguf.GGUFWriter(temporary, architecture)
        for name, value in {**fields, _DIGEST: _digest(arrays)}.items():
            if isinstance(value, str):
                writer.add_string(name, value)
            elif isinstance(value, int):
                writer.add_uint32(name, value)
            else:
                writer.add_float32(name, value)
        for name, tensor in arrays.items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_gguf(path: Path) -> GgufContent:
    """Reads a GGUF file whose tensors are float32 or float16.

    Raises:
        Damaged: what the file is instead.
        OSError: a file that cannot be read.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise Damaged("an empty file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            content = _Reader(data).content()
    expected = content.fields.get(_DIGEST)
    if expected is not None and expected != _digest(content.tensors):
        raise Damaged("tensors that changed after they were written")
    return content


class _Reader:
    """A place in a file, which moves on with everything that is read there."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._place = 0

    def content(self) -> GgufContent:
        """The whole file."""
        if self._taken(4) != b"GGUF":
            raise Damaged("another kind of file")
        version = self._number("I")
        if version not in (2, 3):
            raise Damaged(f"GGUF version {version}")
        tensor_count, field_count = self._count(1), self._count(1)
        fields = dict(self._field() for _ in range(field_count))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise Damaged(f"an alignment of {alignment!r}")
        start = -(-self._place // alignment) * alignment
        tensors = {name: self._tensor(start + offset, dims, dtype) for name, dims, dtype, offset in infos}
        if len(tensors) < len(infos):
            raise Damaged("two tensors of one name")
        return GgufContent(fields, tensors)

    def _taken(self, size: int) -> bytes:
        if size > len(self._data) - self._place:
            raise Damaged("a file that ends early")
        self._place += size
        return self._data[self._place - size : self._place]

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._taken(struct.calcsize(f"<{code}")))[0]

    def _count(self, size: int) -> int:
        """A number of things of at least that many bytes each, which must fit into the rest of the file."""
        count = self._number("Q")
        if count * size > len(self._data) - self._place:
            raise Damaged("a length beyond the file's end")
        return count

    def _string(self) -> str:
        try:
            return self._taken(self._count(1)).decode()
        except UnicodeDecodeError as error:
            raise Damaged("text that is not UTF-8") from error

    def _field(self) -> tuple[str, Any]:
        return self._string(), self._value(self._number("I"))

    def _value(self, kind: int) -> Any:
        """A scalar or a string; arrays, which nothing here needs, are passed over."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise Damaged(f"a field of the unknown type {kind}")
        inner = self._number("I")
        if inner in _SCALARS:
            size = struct.calcsize(f"<{_SCALARS[inner]}")
            self._place += self._count(size) * size
        elif inner == _STRING:
            for _ in range(self._count(8)):
                self._place += self._count(1)
        else:
            raise Damaged(f"an array of the type {inner}")
        return None

    def _tensor_info(self) -> tuple[str, tuple[int, ...], np.dtype[Any], int]:
        name, dimensions = self._string(), self._number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise Damaged(f"a tensor of {dimensions} dimensions")
        dims = tuple(self._number("Q") for _ in range(dimensions))
        kind, offset = self._number("I"), self._number("Q")
        if kind not in _FLOATS:
            raise Damaged(f"a tensor {name!r} that is neither float32 nor float16")
        return name, dims[::-1], _FLOATS[kind], offset

    def _tensor(self, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
        size = dtype.itemsize
        for length in shape:  # Python's integers do not overflow
            size *= length
        if not size:
            raise Damaged("a tensor without numbers")
        if start + size > len(self._data):
            raise Damaged("a tensor beyond the file's end")
        array = np.frombuffer(self._data[start : start + size], dtype).reshape(shape)
        return torch.from_numpy(array.astype(np.float32))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {list(tensor.shape)}\n".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()
