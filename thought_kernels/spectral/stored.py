"""Where a model's weight matrices are kept: safetensors and GGUF files, read one matrix at a time, and token names.

The model itself is never built. So any folder will do, of whatever architecture, sharded or not, an adapter's too.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from thought_kernels.ops.checks import FLOATS
from thought_kernels.ops.library import message

SUFFIX, GGUF = ".safetensors", ".gguf"
INDEX = ".safetensors.index.json"

# The element types that safetensors names and the arithmetic reads; 8-bit floats and integers are quantised weights.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
assert set(DTYPES.values()) == set(FLOATS)
_LAST = ("lm_head", "output", "embed_out")  # heads, which stand after the blocks


class StoredMatrix(NamedTuple):
    """Where a weight matrix is kept.

    Attributes:
        name: the tensor's, with [i] for matrix i of a stack of experts.
        file: the safetensors or GGUF file.
        tensor: the tensor's name in the file.
        part: which matrix of a 3-D tensor, None where the tensor is one matrix.
        shape: rows and columns; of a convolution [out, in · kernel].
        dtype: the element type in the file's words, such as BF16 or Q4_K.
    """

    name: str
    file: Path
    tensor: str
    part: int | None
    shape: tuple[int, int]
    dtype: str

    @property
    def kind(self) -> str:
        """kind_of the name."""
        return kind_of(self.name)

    @property
    def is_readable(self) -> bool:
        """Whether ``read`` gives floats: not of integers, nor of blocks or 8-bit floats that no reader widens."""
        return _widens(self.dtype) if self.file.suffix == GGUF else self.dtype in DTYPES

    @property
    def block(self) -> int | None:
        """block_of the name."""
        return block_of(self.name)

    def read(self) -> Tensor:
        """The matrix, from the file; all of a GGUF file but its float64 is widened to float32.

        Raises:
            ValueError: the file does not hold it.
        """
        if self.file.suffix == GGUF:
            return _read_gguf(self)
        try:
            with safetensors.safe_open(self.file, framework="pt") as file:
                if self.part is not None:
                    return file.get_slice(self.tensor)[self.part]
                return file.get_tensor(self.tensor).flatten(1)
        except (OSError, safetensors.SafetensorError) as error:
            raise _unreadable(self.file, error) from error


def kind_of(name: str) -> str:
    """A matrix's name without numbers, the same in every block: "model.layers.self_attn.o_proj"."""
    pieces = [piece for piece in re.sub(r"\[\d+\]", "", name).split(".") if not piece.isdecimal()]
    return ".".join(pieces[:-1] if len(pieces) > 1 and pieces[-1] == "weight" else pieces)


def block_of(name: str) -> int | None:
    """The 0-based block index, the first number in a matrix's name; None outside of blocks."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number[1]) if number else None


def stored_matrices(model: str | Path) -> list[StoredMatrix]:
    """Every weight matrix of a model folder or file, as the model runs through them; only headers are read.

    Embeddings first, then block by block, then the head; what is inside a block keeps the file's order, but numbered
    parts such as experts come by number. Two dimensions are a matrix; three are a stack of them, as experts are kept;
    four or more, of which two are larger than 1, are a convolution, a row per output channel. Vectors are none, and
    neither are matrices of one row or column, unless that is a column of integers: so 4-bit weights are packed.

    Args:
        model: a folder with .safetensors files, with or without an index, or with one .gguf file; or such a file.

    Returns:
        StoredMatrix for each, quantised ones included.

    Raises:
        ValueError: no such files, shards that are missing, or files that are damaged.
    """
    found: list[StoredMatrix] = []
    for path in _files(Path(model)):
        found += _gguf_matrices(path) if path.suffix == GGUF else _safetensors_matrices(path)
    return _in_order(found)


def token_names(model: str | Path) -> list[str] | None:
    """The vocabulary as its file writes it, by token id; None where there is none beside the weights.

    Args:
        model: as stored_matrices takes it.
    """
    files = _files(Path(model))
    if files[0].suffix == GGUF:
        field = _open_gguf(files[0]).fields.get("tokenizer.ggml.tokens")
        return None if field is None else [bytes(field.parts[i]).decode("utf-8", "replace") for i in field.data]
    path = files[0].parent / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = record["model"]["vocab"]
        pairs = list(vocabulary.items()) if isinstance(vocabulary, dict) else [(t, i) for i, (t, _) in
                                                                              enumerate(vocabulary)]  # fmt: skip
        pairs += [(token["content"], token["id"]) for token in record.get("added_tokens", ())]
        names = [""] * (1 + max(index for _, index in pairs))
        for name, index in pairs:
            names[index] = name
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error
    return names


def _in_order(found: list[StoredMatrix]) -> list[StoredMatrix]:
    """By place in the model; inside of a block by where a part is first met, and numbered parts by number."""
    met: dict[str, int] = {}

    def place(matrix: StoredMatrix) -> tuple[int, ...]:
        block = matrix.block
        if block is None:
            return (2 if any(name in _LAST for name in matrix.kind.split(".")) else 0,)
        pieces = re.split(r"(\d+)", matrix.name)
        texts = ["".join(pieces[: end + 1]) for end in range(0, len(pieces), 2)]
        order = [met.setdefault(text, len(met)) for text in texts]
        numbers = [int(number) for number in pieces[1::2]]
        return (1, block, *(value for pair in zip(order, [*numbers, 0], strict=True) for value in pair))

    return sorted(found, key=place)


def _safetensors_matrices(path: Path) -> list[StoredMatrix]:
    found: list[StoredMatrix] = []
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                header = file.get_slice(name)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                if len(shape) == 2 and shape[1] == 1 < shape[0] and not dtype.startswith(("F", "BF")):
                    found.append(StoredMatrix(name, path, name, None, (shape[0], 1), dtype))
                found += [StoredMatrix(*where, dtype) for where in _matrices_of(name, path, shape)]
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from error
    return found


def _matrices_of(name: str, path: Path, shape: tuple[int, ...]) -> list[tuple[str, Path, str, int | None, Any]]:
    if len(shape) == 3 and min(shape[1:]) > 1:
        return [(f"{name}[{i}]", path, name, i, shape[1:]) for i in range(shape[0])]
    if len(shape) > 3:
        shape = (shape[0], torch.Size(shape[1:]).numel())
    return [(name, path, name, None, shape)] if len(shape) == 2 and min(shape) > 1 else []


def _gguf_matrices(path: Path) -> list[StoredMatrix]:
    found: list[StoredMatrix] = []
    for tensor in _open_gguf(path).tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))  # the file counts from the fastest
        found += [StoredMatrix(*where, tensor.tensor_type.name) for where in _matrices_of(tensor.name, path, shape)]
    return found


def _open_gguf(path: Path) -> Any:
    """The reader of a file, kept while the same file is read: it lists the vocabulary each time anew."""
    try:
        return _opened(path, path.stat().st_mtime_ns)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise _unreadable(path, error) from error


@functools.lru_cache(maxsize=1)
def _opened(path: Path, changed: int) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        fix = "pip install gguf"
        raise OSError(message("stored_matrices", "model", "be of files that can be read", GGUF, fix)) from error
    return GGUFReader(path)


@functools.cache
def _widens(dtype: str) -> bool:
    """Whether the gguf package reads a type as floats, found out on one block of zeros."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    if dtype == "F64":
        return True
    kind = GGMLQuantizationType[dtype]
    try:
        with np.errstate(all="ignore"):
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _read_gguf(matrix: StoredMatrix) -> Tensor:
    from gguf.quants import dequantize

    for tensor in _open_gguf(matrix.file).tensors:
        if tensor.name == matrix.tensor:
            data = tensor.data if matrix.part is None else tensor.data[matrix.part]
            if matrix.dtype == "F64":
                return torch.tensor(data, dtype=torch.float64).reshape(matrix.shape)
            widened = torch.tensor(dequantize(data, tensor.tensor_type), dtype=torch.float32)
            return widened.reshape(matrix.shape)
    raise _unreadable(matrix.file, KeyError(matrix.tensor))


def _files(model: Path) -> list[Path]:
    if model.is_file() and model.suffix in (SUFFIX, GGUF):
        return [model]
    if not model.is_dir():
        rule = f"be a folder, a {SUFFIX} or a {GGUF} file"
        raise ValueError(message("stored_matrices", "model", rule, repr(str(model)), "nothing is there"))
    indices = sorted(model.glob(f"*{INDEX}"))
    if not indices:
        files = sorted(model.glob(f"*{SUFFIX}")) or sorted(model.glob(f"*{GGUF}"))
        if len(files) > 1 and files[0].suffix == GGUF:
            what = f"{len(files)} in {str(model)!r}"
            raise ValueError(message("stored_matrices", "model", f"hold one {GGUF} file", what, "name the file"))
        if not files:
            what = f"none in {str(model)!r}"
            raise ValueError(message("stored_matrices", "model", f"hold {SUFFIX} files", what, "convert others first"))
        return files
    names: set[str] = set()
    for index in indices:
        try:
            names.update(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise _unreadable(index, error) from error
    files = [model / name for name in sorted(names)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        what = f"{len(missing)} missing, such as {missing[0]!r}"
        raise ValueError(message("stored_matrices", "model", "hold every shard that its index names", what))
    return files


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(message("stored_matrices", str(path), "be a readable, undamaged file", str(error) or repr(error)))
